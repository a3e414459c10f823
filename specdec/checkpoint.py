"""Weights on disk: complete or not there at all.

A checkpoint is a folder with ``model.safetensors`` and, written last, ``config.json``. A training that can go on has
``training.pt`` beside them: optimizer, position and random state of one moment, replaced as one file.
"""

import json
import os
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from .data import write_json
from .model import ModelConfig, Transformer


def save_model(model: Transformer, folder: Path, info: dict) -> None:
    """Write weights and config; ``info`` is kept in the config file for whoever loads it."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").unlink(missing_ok=True)  # incomplete from here on
    temporary = folder / f"model.safetensors.{os.getpid()}.partial"  # two processes may train the same model
    with told(temporary):
        save_file({name: w.detach().contiguous().cpu() for name, w in model.state_dict().items()}, temporary)
    put_in_place(temporary, folder / "model.safetensors")
    write_json(folder / "config.json", {"model": asdict(model.config), "info": info})


def load_model(folder: Path, device: str | torch.device = "cpu") -> tuple[Transformer, dict]:
    """The model in eval mode and its info; ValueError if it is missing, cut short or of another kind."""
    folder = Path(folder)
    try:
        saved = json.loads((folder / "config.json").read_text())
        model, info = Transformer(ModelConfig(**saved["model"])), saved["info"]
    except FileNotFoundError:
        raise ValueError(f"there is no finished checkpoint in {folder.name!r}; train it first.") from None
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        message = f"config.json in {folder.name!r} does not describe a specdec model; delete that folder and train again."
        raise ValueError(message) from error
    try:
        weights = load_file(folder / "model.safetensors")
    except (OSError, SafetensorError) as error:
        message = f"the weights in {folder.name!r} are missing or cut short; delete it and train again."
        raise ValueError(message) from error
    load_weights(model, weights, folder.name)
    return model.to(device).eval(), info


def load_weights(model: Transformer, weights: dict, name: str) -> None:
    """Put weights into a model of the same shape; ValueError if they belong to another."""
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        message = f"the weights in {name!r} are of another architecture; use the config they came with."
        raise ValueError(message) from error


def save_training(folder: Path, state: dict) -> None:
    """Replace the resume point by ``state`` in one step, so that a cut leaves the old or the new one, never half."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f"training.pt.{os.getpid()}.partial"
    with told(temporary):
        torch.save(state, temporary)
    put_in_place(temporary, folder / "training.pt")


def load_training(folder: Path) -> dict | None:
    """The last resume point, its tensors on the CPU, or None if there is none; ValueError if it cannot be read."""
    try:
        return torch.load(Path(folder) / "training.pt", map_location="cpu", weights_only=True)
    except FileNotFoundError:
        return None
    except Exception as error:
        message = f"training.pt in {Path(folder).name!r} is damaged; delete it to start that training again."
        raise ValueError(message) from error


def clear_training(folder: Path) -> None:
    (Path(folder) / "training.pt").unlink(missing_ok=True)


@contextmanager
def told(path: Path):
    """What the libraries raise where a file cannot be written, as the system's own kind of error."""
    try:
        yield
    except (SafetensorError, RuntimeError) as error:
        path.unlink(missing_ok=True)
        raise OSError(f"{path.name} cannot be written ({error}); make room, then run it again.") from error


def put_in_place(temporary: Path, path: Path) -> None:
    """Rename, once the bytes are on the disk: after a power cut a file of that name is whole."""
    with open(temporary, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)
