"""The batches of a run, whatever it reads: text of a prepared folder, or a task."""

from effarch.data import dataset as dataset_lib
from effarch.data import pipeline
from effarch.data.tasks import streams

Source = dataset_lib.Dataset | streams.TaskData


def open_source(data) -> Source:
    """What the section `config.data` names; text is prepared on first use. Raises ValueError."""
    if data.task.name != "none":
        return streams.open_task(data.task, seq_len=data.seq_len)
    return dataset_lib.find_or_prepare(
        data.sources,
        data.tokenizer,
        data.val_permille,
        path=data.path,
        cache_dir=data.cache_dir,
    )


def training(source: Source, data, *, seed: int):
    """Batches by step: `rows(step, start, stop)` and `window_ids(step)`."""
    if isinstance(source, streams.TaskData):
        return streams.TrainBatches(source, batch_size=data.batch_size, seed=seed)
    return pipeline.TrainBatches(
        source,
        batch_size=data.batch_size,
        seq_len=data.seq_len,
        seed=seed,
        weights=data.weights,
    )


def validation(source: Source, data, *, max_batches: int = 0):
    """Held-out batches, all if `max_batches` is 0: `rows(index, start, stop)` and `scored(index)`."""
    if isinstance(source, streams.TaskData):
        return streams.ValidationBatches(
            source, batch_size=data.batch_size, max_batches=max_batches
        )
    return pipeline.ValidationBatches(
        source, batch_size=data.batch_size, seq_len=data.seq_len, max_batches=max_batches
    )
