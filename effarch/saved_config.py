"""The config file behind `--config=FILE.json`: the config.json of a run folder, or one of its own."""

import json
import pathlib

from effarch import config


def get_config(path=""):
    """The config in a JSON file, as `effarch.config.to_json` or a run folder wrote it.

    Fields that it lacks have their defaults.
    """
    try:
        content = json.loads(pathlib.Path(path).read_text())
        return config.completed(config.from_json(json.dumps(content.get("config", content))))
    except (json.JSONDecodeError, AttributeError) as error:
        raise ValueError(f"{path} does not hold a config ({error}).") from error
