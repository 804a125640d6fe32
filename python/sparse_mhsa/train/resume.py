"""Holding a checkpoint against the run that wants to go on from it, before anything of the run is changed."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import UsageError
from .checkpoint import Field
from .datasets import fingerprint
from .options import flag_name

if TYPE_CHECKING:
    from .engine import Trainer

MUST_AGREE = (
    "model",
    "dataset",
    "batch_size",
    "accum_iter",
    "world_size",
    "start_epoch",
    "task",
    "attention",
    "mask_on",
    "frames",
    "stride",
    "clips_per_film",
    "seed",
    "layer_decay",
    "amp",
    "model_ema",
    "two_branch",
    "linear_probe",
)
"""Options without which "the same step of the same run" has no meaning."""
MAY_DIFFER = (
    "data_path",
    "download",
    "attn_cfg",
    "decoder_attn_cfg",
    "finetune",
    "device",
    "num_workers",
    "pin_mem",
    "no_pin_mem",
    "dist",
    "dist_url",
    "dist_on_itp",
    "dist_eval",
    "local_rank",
    "resplit",
    "output_dir",
    "log_dir",
    "progress",
    "resume",
    "overwrite",
    "eval",
    "dry_run",
)
"""Options that do not change what is computed (``attn_cfg``: its content is compared, not its path)."""


def resolve_attention(
    state: dict[str, Any], path: Path, attn_cfg: Path | None, given: str | None, field: str = "attention"
) -> str | None:
    """The attention of a run that goes on from a checkpoint: the checkpoint's own.

    Args:
        state: what `read_checkpoint` returned.
        path: the checkpoint.
        attn_cfg: ``--attn-cfg``, which may repeat the checkpoint's configuration.
        given: the configuration in ``attn_cfg`` as YAML text with all defaults, or ``None``.
        field: of the checkpoint: ``attention`` or ``decoder_attention``.

    Returns:
        YAML text with all defaults, or ``None`` for dense attention.

    Raises:
        UsageError: ``attn_cfg`` contradicts the checkpoint, or the checkpoint's configuration cannot be read.
    """
    from .. import AttentionConfig, ConfigError

    flag = "--attn-cfg" if field == "attention" else "--decoder-attn-cfg"
    if state[field] is None:
        if given is not None:
            raise UsageError(f"--resume: '{path}' was trained with dense attention, but {flag} is '{attn_cfg}'")
        return None
    try:
        own = AttentionConfig.parse(state[field], source=f"{path}: {field}")
    except ConfigError as error:
        raise UsageError(f"--resume: '{path}' is damaged: {field}: {error}") from error
    if given is not None and AttentionConfig.parse(given) != own:
        lines = difference(own.to_yaml(), given)
        raise UsageError(f"--resume: '{path}' was trained with another attention than {flag} '{attn_cfg}': {lines}")
    return own.to_yaml()


def difference(before: str, now: str) -> str:
    """The lines in which two YAML texts differ, in words."""
    was, has = before.splitlines(), now.splitlines()
    removed = ", ".join(line.strip() for line in was if line not in has)
    added = ", ".join(line.strip() for line in has if line not in was)
    return f"it has {removed or 'no such line'} where the file has {added or 'no such line'}"


def check_run(trainer: "Trainer", state: dict[str, Any], path: Path) -> Iterator[str]:
    """Compare everything but the weights.

    Yields:
        What differs and makes the result another than that of an uninterrupted run.

    Raises:
        UsageError: the checkpoint cannot be continued by this run; the message names the field or the option.
    """
    root = Field(path, "", state)
    given, before = trainer.options.as_dict(), root["args"]
    for name, value in given.items():
        if name in MAY_DIFFER or before.value.get(name, NotImplemented) == value:
            continue
        if before[name].value is NotImplemented:
            before[name].reject(f"the value of {flag_name(name)}")
        message = f"'{path}' was written with {flag_name(name)} {before.value[name]}, this run has {value}"
        if name in MUST_AGREE:
            raise UsageError(f"--resume: {message}")
        yield message
    train_images = trainer.data.sizes[0]
    if state["data"]["train_images"] != train_images:
        raise UsageError(
            f"--resume: '{path}' was written with {state['data']['train_images']} training "
            f"{trainer.options.sample_name}s, this run has {train_images}; a file that cannot be read must be "
            "replaced, not removed: on other data the run starts anew (--overwrite instead of --resume)"
        )
    sets = {"training": trainer.data.train, "test": trainer.data.test}
    for name, known in state["data"].get("sets", {}).items():
        found = fingerprint(sets[name]) if name in sets else None
        if None not in (known, found) and known != found:
            raise UsageError(
                f"--resume: '{path}' was written with other files in the {name} set than --data-path has now; an image "
                "must be replaced, not removed, added or renamed: on other data the run starts anew (--overwrite "
                "instead of --resume)"
            )
    options, steps = trainer.options, trainer.steps_per_epoch
    if state["epoch"] > options.epochs:
        raise UsageError(
            f"--resume: '{path}' is damaged or of a longer run: epoch: {state['epoch']} epochs are finished, "
            f"--epochs is {options.epochs}"
        )
    root["step"].integer(0, steps if state["epoch"] < options.epochs else 0)
    images = state["step"] * options.images_per_step
    root["meter"]["images"].integer(images, images)
    for name in ("step_seconds", "attention_seconds"):
        if len(seconds := state["meter"][name]) != state["step"]:
            root["meter"][name].reject(f"one duration for each of the {state['step']} steps done", len(seconds))
    if len(state["rng"]) != options.world_size:
        root["rng"].reject(f"the generators of {options.world_size} processes", f"those of {len(state['rng'])}")
    if options.amp == "fp16" and state["scaler"].keys() != trainer.scaler.state_dict().keys():
        root["scaler"].reject(f"the keys {', '.join(trainer.scaler.state_dict())}", ", ".join(state["scaler"]))
    for name in state["scaler"]:
        root["scaler"][name].number(0)
    done = (state["epoch"] - options.start_epoch) * steps + state["step"]
    check_optimizer(root["optimizer"], trainer.optimizer, done)


def check_data(trainer: "Trainer", state: dict[str, Any], path: Path) -> None:
    """The outputs of the model must mean the classes of the data.

    Raises:
        UsageError: the classes differ.
    """
    before, now = state["data"]["classes"], list(trainer.data.class_names)
    if before != now:
        odd = [
            f"only {where}: {', '.join(sorted(names)[:5])}"
            for where, names in (("there", set(before) - set(now)), ("here", set(now) - set(before)))
            if names
        ]
        raise UsageError(
            f"--resume: '{path}' was trained on other classes than those of --dataset {trainer.options.data_name} "
            f"({len(before)} and {len(now)}; {'; '.join(odd) or 'another order'})"
        )


def check_model(trainer: "Trainer", state: dict[str, Any], path: Path) -> None:
    """The weights, and the averaged ones, must be those of the model.

    Raises:
        UsageError: names, shapes or dtypes differ, or a weight is not finite.
    """
    _check_weights(trainer, Field(path, "model", state["model"]), path)
    if trainer.ema is not None:
        if state["ema"] is None:
            raise UsageError(f"--resume: '{path}' was written without --model-ema, this run has it")
        _check_weights(trainer, Field(path, "ema", state["ema"]), path)


def _check_weights(trainer: "Trainer", weights: Field, path: Path) -> None:
    own = trainer.model.state_dict()

    def differ(what: str) -> UsageError:
        return UsageError(f"--resume: '{path}' holds another model than {trainer.options.model_name}: {what}")

    for name, tensor in own.items():
        if name not in weights.value:
            raise differ(f"it has no {name}")
        if (was := _kind(weights.value[name])) != (now := _kind(tensor)):
            raise differ(f"{name} is {was}, this run's is {now}")
        if not torch.isfinite(weights.value[name]).all():
            weights[name].reject("finite numbers", "NaN or infinity")
    if unknown := sorted(weights.value.keys() - own.keys()):
        raise differ(f"it also has {', '.join(unknown[:3])}")


def check_optimizer(field: Field, optimizer: torch.optim.Optimizer, done: int) -> None:
    """The moments must be those of the optimizer's parameters after at most ``done`` steps.

    Raises:
        UsageError: groups, parameters, shapes or values do not fit.
    """
    own = optimizer.state_dict()["param_groups"]
    groups = field["param_groups"].items()
    layout = [group["params"] for group in own]
    if [group.mapping().get("params") for group in groups] != layout:
        field["param_groups"].reject(
            f"{len(own)} groups of {', '.join(str(len(one)) for one in layout)} parameters", "others"
        )
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    moments = field["state"].instance(dict, "a mapping")
    for index, state in moments.items():
        one = Field(field.path, f"{field.name}.state[{index!r:.40}]", state)
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < len(parameters):
            one.reject(f"a parameter from 0 to {len(parameters) - 1}", "this index")
        if one.tensors().keys() != {"step", "exp_avg", "exp_avg_sq"}:
            one.reject("step, exp_avg and exp_avg_sq", ", ".join(one.value)[:200])
        for name in ("exp_avg", "exp_avg_sq"):
            if (was := _kind(one[name].value)) != (now := _kind(parameters[index])):
                one[name].reject(now, was)
            least = one[name].value.min() if one[name].value.numel() else 0
            if not torch.isfinite(one[name].value).all() or (name == "exp_avg_sq" and least < 0):
                one[name].reject("finite numbers" if name == "exp_avg" else "finite numbers of at least 0", "others")
        step = one["step"].value
        if step.is_meta or step.numel() != 1 or step.is_complex() or not 1 <= step.item() <= done:
            one["step"].reject(
                f"a number from 1 to {done}", step.tolist() if step.numel() == 1 and not step.is_meta else _kind(step)
            )


def _kind(tensor: Tensor) -> str:
    name = str(tensor.dtype).removeprefix("torch.")
    if tensor.is_meta:
        return f"without values, {name} {tuple(tensor.shape)}"
    layout = "" if tensor.layout == torch.strided else f"{str(tensor.layout).removeprefix('torch.')} "
    return f"{layout}{name} {tuple(tensor.shape)}"
