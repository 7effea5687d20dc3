"""The load of experts as a picture: layers down, experts across, each against an even share."""

import html

import numpy as np

from effarch.training import report_figures
from effarch.training.report_runs import Run

_COLOURS = ("#2b62b8", "#8fa9c9", "#c9c6bf", "#e2a368", "#c8501f")
"""Of a quarter of an even share or less, half, all, double, four times or more."""
_ROW_INCHES, _MOST_INCHES = 0.16, 4.2


def figure(run: Run, name: str, label: str = "") -> str:
    """The run's picture as an HTML `figure`; `name` must be its own on the page."""
    layers = sorted(run.expert_load)
    widest = max(len(run.expert_load[layer]) for layer in layers)
    ratio_YE = np.full((len(layers), widest), np.nan)
    for row, layer in enumerate(layers):
        shares = np.asarray(run.expert_load[layer])
        ratio_YE[row, : len(shares)] = shares * len(shares)
    title = f"Load of experts{f', {label}' if label else ''}"
    svg = report_figures.inline(
        lambda drawing: _draw(drawing, ratio_YE, layers),
        title,
        name,
        (5.0, min(1.3 + _ROW_INCHES * len(layers), _MOST_INCHES)),
    )
    row, expert = np.unravel_index(np.nanargmax(ratio_YE), ratio_YE.shape)
    unused = int(np.sum(ratio_YE < 1e-3))
    note = (
        f"Tokens of an expert against an even share, mean over the last 100 steps or so. Most: "
        f"{ratio_YE[row, expert]:.2f}, expert {expert} of layer {layers[row]}. "
        f"Without tokens: {unused} of {int(np.sum(~np.isnan(ratio_YE)))}."
    )
    return (
        f"<figure><figcaption><h3>{html.escape(title)}</h3>"
        f'<div class="legend"><span>{html.escape(note)}</span></div></figcaption>{svg}</figure>'
    )


def _draw(drawing, ratio_YE: np.ndarray, layers: list[int]) -> None:
    from matplotlib import colors, ticker

    height = drawing.get_figheight()
    axes = drawing.add_axes((0.11, 0.5 / height, 0.87, 1 - 1.05 / height))
    bar = drawing.add_axes((0.41, 1 - 0.16 / height, 0.57, 0.12 / height))
    scale = colors.LinearSegmentedColormap.from_list("load", _COLOURS)
    picture = axes.imshow(
        np.log2(np.maximum(ratio_YE, 0.25)),
        cmap=scale,
        norm=colors.Normalize(-2, 2),
        aspect="auto",
        interpolation="none",
    )
    legend = drawing.colorbar(picture, cax=bar, orientation="horizontal", ticks=range(-2, 3))
    legend.ax.set_xticklabels(["1/4", "1/2", "even", "2x", "4x"])
    legend.solids.set_rasterized(True)
    axes.set_xlabel("expert")
    axes.set_ylabel("layer")
    axes.xaxis.set_major_locator(ticker.MaxNLocator(8, steps=(1, 2, 4, 5, 10), integer=True))
    every = -(-len(layers) // 12)
    axes.set_yticks(range(0, len(layers), every), [str(layer) for layer in layers[::every]])
    for part in (axes, legend.ax):
        part.tick_params(length=0, pad=4)
    for side in (*axes.spines.values(), legend.outline):
        side.set_visible(False)
