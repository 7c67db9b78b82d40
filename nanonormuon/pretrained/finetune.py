"""What a run with train.init_from takes from that model: its architecture and its weights."""

import logging
from dataclasses import replace
from pathlib import Path

from nanonormuon.config import Config, differences
from nanonormuon.engine import Engine
from nanonormuon.errors import ConfigError
from nanonormuon.pretrained import models
from nanonormuon.runtime import distributed
from nanonormuon.storage.shards import Data
from nanonormuon.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)


def adopt(config: Config, data: Data) -> Config:
    """Take the model's configuration. Raises ConfigError if the data have more token ids."""
    source = config.train.init_from
    directory = models.find_checkpoint(Path(source))
    model = models.model_config(directory)
    if (data.vocab_size or 0) > model.vocab_size:
        raise ConfigError(
            f"train.init_from = {source}: a model of {model.vocab_size} token ids, the data in "
            f"{data.path} have {data.vocab_size}: set data.path to text prepared with "
            f"--tokenizer {directory / 'tokenizer.json'}"
        )
    return replace(config, model=model)


def begin_with(config: Config, engine: Engine, tokenizer: Tokenizer | None) -> None:
    """Fill the engine with the model's weights, if it and the data's tokenizer are that model's.
    Raises ConfigError or CheckpointError naming the difference."""
    path = Path(config.train.init_from)
    found = Path(distributed.first_does(lambda: str(models.find_checkpoint(path))))
    model = models.model_config(found)
    if lines := differences(Config(model=model), Config(model=config.model)):
        raise ConfigError(f"train.init_from = {path}: another model: {'; '.join(lines)}")
    models.check_tokenizer(found, tokenizer)
    models.load_weights(engine.model, found)
    log.info(f"weights of {found}")
