"""The table of a sweep: a line per task with its differences from the paper, VTAB's mean; as JSON and Markdown."""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pretrain.config import MAY_CHANGE, model_name
from pretrain.data.manifest import load_manifest
from pretrain.errors import UserError
from pretrain.finetune.scores import RunScore, chosen_lr, real_score, score
from pretrain.finetune.sweep import Sweep, final_runs, fitting_size, key_of, selecting_runs, write_out
from pretrain.tasks.preparation import set_differences
from pretrain.tasks.table import VTAB, vtab_means

# The paper's Table 2 has ImageNet at a higher resolution, 512 px for L/16 and 518 for H/14, with Polyak averages.
# Its Table 5, and all other tasks, are at 384 px without averages.
_TABLE_2_SIZES = {("L", 16): 512, ("H", 14): 518}
_TABLE_2_AVERAGE = 0.9999
_NUM_REAL = 46_837  # validation images that have a ReaL label; the other 3,163 have none


def results(sweep: Sweep) -> dict[str, Any] | None:
    """Returns a task's line of the table from the scores of its runs, None while no final run is done."""
    line = reached(sweep)
    return line and {**line, "differs": differences_from_paper(sweep, line["n"])}


def reached(sweep: Sweep) -> dict[str, Any] | None:
    """Returns a line without the differences from the paper, None while no final run is done.

    It has no times and no paths: a sweep gives the same bytes however often it was interrupted.
    """
    lr = chosen_lr(sweep)
    if lr is None:
        return None
    found = [score(config) for config in final_runs(sweep, lr)]
    done = [one for one in found if one is not None]
    if not done:
        return None
    selected = [(config.optim.lr, score(config)) for config in selecting_runs(sweep)]
    return {
        "format": "pretrain-finetuning",
        "version": 1,
        "task": sweep.task.name,
        "metric": sweep.task.metric,
        **over_seeds(done),
        "seeds": [seed for seed, one in enumerate(found) if one is not None],
        "complete": len(done) == sweep.num_seeds,
        "lr": lr,
        "selection": [
            {"lr": rate, "top1": one.top1 if one.num_images else None, "n": one.num_images}
            for rate, one in selected
            if one
        ],
        "from_scratch": sweep.start.weights is None,
        "weights": sweep.start.sha256,
        "model": model_name(sweep.start.model, with_size=False),
        "image_size": sweep.protocol.image_size,
        "steps": sweep.protocol.steps,
    }


def over_seeds(scores: Sequence[RunScore]) -> dict[str, Any]:
    """Returns the entries of a line on its seeds' scores."""
    return {**_mean_and_std([one.top1 for one in scores]), "n": min(one.num_images for one in scores)}


def _mean_and_std(values: list[float]) -> dict[str, Any]:
    """Returns the entries of a line on its seeds' values: mean, deviation, values."""
    return {
        "mean": statistics.fmean(values),
        "std": statistics.stdev(values) if len(values) > 1 else None,  # of a sample: divided by n - 1
        "values": values,
    }


def differences_from_paper(sweep: Sweep, num_scored: int) -> list[str]:
    """Returns the differences from the paper's protocol that rule out a comparison with its results."""
    paper, ours = sweep.task.finetuning, sweep.protocol
    assert paper is not None
    table_2 = _is_table_2(sweep)
    size = ours.image_size if table_2 else fitting_size(paper.image_size, sweep.start.model)
    pairs = {name: (getattr(ours, name), getattr(paper, name)) for name in ("steps", "warmup_steps", "lr_grid")}
    pairs["image_size"] = (ours.image_size, size)
    told = [f"{name}: {_shown(now)} instead of {_shown(was)}" for name, (now, was) in pairs.items() if now != was]
    told += set_differences(sweep.test.parent.parent)
    if num_scored != (num_images := load_manifest(sweep.test).num_samples):
        told.append(f"{num_scored:,} of {num_images:,} test images could be scored")
    if sweep.num_seeds != 3:
        told.append(f"{sweep.num_seeds} instead of 3 seeds")
    free = set(MAY_CHANGE) - {"data.order"}  # the order decides which images are held out to choose the rate
    free |= {"optim.average_decay"} if table_2 else set()
    return told + [override for override in sweep.overrides if key_of(override) not in free]


def _is_table_2(sweep: Sweep) -> bool:
    """Returns whether this is ImageNet as in the paper's Table 2: at a higher resolution, with averaged weights."""
    config = final_runs(sweep, sweep.protocol.lr_grid[0])[0]
    size = _TABLE_2_SIZES.get((sweep.start.model.name, sweep.start.model.patch_size))
    is_its_size = sweep.protocol.image_size == size
    return sweep.task.name == "imagenet" and is_its_size and config.optim.average_decay == _TABLE_2_AVERAGE


def real_results(sweep: Sweep, imagenet: dict[str, Any]) -> dict[str, Any] | None:
    """Returns ReaL's line: ImageNet's final runs scored by ReaL labels; None until all of them are."""
    configs = {config.seed: config for config in final_runs(sweep, imagenet["lr"])}
    scores = [real_score(configs[seed]) for seed in imagenet["seeds"]]
    found = [one for one in scores if one is not None]
    if len(found) < len(scores):
        return None
    line = {**imagenet, "task": "real", **over_seeds(found), "selection": []}
    if line["n"] != _NUM_REAL:
        told = f"{line['n']:,} instead of {_NUM_REAL:,} images with ReaL labels"
        line["differs"] = [*imagenet["differs"], told]
    return line


def _shown(value: Any) -> str:
    """A number or numbers as the tables show them."""
    return " ".join(f"{one:g}" for one in value) if isinstance(value, tuple) else str(value)


def write_results(folder: Path, found: dict[str, Any]) -> None:
    """Writes a line's results.json and results.md."""
    scored = "random weights" if found["from_scratch"] else "pretrained weights"
    seeds = f"{len(found['values'])} seed" + "s" * (len(found["values"]) > 1)
    lines = [
        f"# {found['task']}",
        "",
        f"{found['model']} at {found['image_size']} px, {found['steps']:,} steps from {scored}: "
        f"**{percent(found)}** {found['metric']} on {found['n']:,} test images ({seeds}), rate {found['lr']:g}.",
        "",
    ]
    if found["selection"]:
        lines += ["| learning rate | top-1 on held-out training images | images |", "| ---: | ---: | ---: |"]
        for one in found["selection"]:
            cell = "not finite" if one["top1"] is None else f"{one['top1']:.2%}"
            lines.append(f"| {one['lr']:g} | {cell} | {one['n']:,} |")
        lines.append("")
    if found["differs"]:
        lines += [f"Not the paper's protocol: {'; '.join(found['differs'])}.", ""]
    write_out(folder / "results.json", json.dumps(found, indent=2))
    write_out(folder / "results.md", "\n".join(lines))


def vtab_results(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns VTAB's line: the flat mean over its tasks, and the means of the groups, over the seeds all tasks have.

    The line's name says when tasks or runs are missing: such a mean is not VTAB's. Raises UserError when the tasks have
    no seed in common.
    """
    by_task = {one["task"]: one for one in found}
    names = [name for name in VTAB if name in by_task]
    seeds = [seed for seed in by_task[names[0]]["seeds"] if all(seed in by_task[name]["seeds"] for name in names)]
    if not seeds:
        raise UserError("no seed is done in all of these tasks; run the missing ones first")
    scores = {name: dict(zip(by_task[name]["seeds"], by_task[name]["values"])) for name in names}
    means = [vtab_means({name: scores[name][seed] for name in names}) for seed in seeds]
    complete = len(names) == len(VTAB) and all(by_task[name]["complete"] for name in names)
    rates = {by_task[name]["lr"] for name in names}
    return {
        "format": "pretrain-finetuning",
        "version": 1,
        "task": "vtab" if complete else f"vtab, incomplete: {len(names)} of {len(VTAB)} tasks",
        "metric": "top1",
        **_mean_and_std([of_seed["vtab"] for of_seed in means]),
        "seeds": seeds,
        "complete": complete,
        "lr": rates.pop() if len(rates) == 1 else None,
        "n": sum(by_task[name]["n"] for name in names),
        "groups": {name: statistics.fmean(of[name] for of in means) for name in means[0] if name != "vtab"},
        "tasks": {name: statistics.fmean(scores[name][seed] for seed in seeds) for name in names},
        "missing": [name for name in VTAB if name not in by_task],
        "from_scratch": by_task[names[0]]["from_scratch"],
        "weights": by_task[names[0]]["weights"],
        "differs": list(dict.fromkeys(text for name in names for text in by_task[name]["differs"])),
    }


def write_vtab(out: Path, found: dict[str, Any]) -> None:
    """Writes VTAB's results.json and results.md into OUT/vtab."""
    lines = [f"# {found['task']}", "", f"Mean of the tasks: **{percent(found)}**.", "", "| | top-1 |", "| --- | ---: |"]
    lines += [f"| {name} | {value:.2%} |" for name, value in (found["tasks"] | found["groups"]).items()]
    if found["missing"]:
        lines += ["", f"Missing: {', '.join(found['missing'])}."]
    if found["differs"]:
        lines += ["", f"Not the paper's protocol: {'; '.join(found['differs'])}."]
    write_out(out / "vtab" / "results.json", json.dumps(found, indent=2))
    write_out(out / "vtab" / "results.md", "\n".join(lines) + "\n")


def percent(found: dict[str, Any]) -> str:
    """Returns mean and standard deviation as the tables show them."""
    return f"{found['mean']:.2%}" + (f" ± {100 * found['std']:.2f}" if found["std"] is not None else "")
