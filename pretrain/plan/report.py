"""The plan as a value, and as tables of 80 columns: first what to do, last the details behind it."""

from dataclasses import asdict, dataclass, replace
from typing import Any

from pretrain import cli
from pretrain.config import Config, config_from_dict, config_to_dict
from pretrain.gpus import GIB
from pretrain.plan.choose import MICRO_BATCHES, Choice, best, layout_of, least_memory
from pretrain.plan.failures import Failures, Saves, best_interval_s, goodput
from pretrain.plan.launches import is_compiled
from pretrain.plan.memory import STAGES, Layout, activation_bytes, memory, moment_bytes
from pretrain.plan.speed import Cluster, Rate, communication_s, volume
from pretrain.sizes import plain_forward_macs, plain_parameters

DAY_S = 86_400
GOODPUT_GPUS = (8, 64, 512, 1024, 4096, 10_000)
TABLE_MODELS = ("B/16", "L/16", "H/14", "g/14", "G/14", "e/14", "22B/14")
TABLE_GPUS = (1, 2, 4, 8, 16, 64, 256, 512)


@dataclass(frozen=True)
class Assumptions:
    """What the plan takes for granted; each has an option of tools/plan.py."""

    num_classes: int
    rate: Rate
    usable_bytes: float
    price_per_gpu_h: float
    loader_rate: float  # images per second and core
    image_bytes: float
    saves: Saves
    failures: Failures


def checkpoint_bytes(config: Config, num_classes: int) -> int:
    """Returns the size of a checkpoint: float32 weights, moments, averages."""
    averages = 4 if config.optim.average_decay else 0
    return plain_parameters(config.model, num_classes) * (4 + moment_bytes(config) + averages)


def kept_checkpoints(config: Config) -> int:
    """Returns the most checkpoints that lie on the disk: the newest, the one being written, the kept ones."""
    every = config.checkpoint.keep_every_steps
    kept = config.total_steps // every if every else 0
    return config.checkpoint.keep_last + 1 + kept + config.checkpoint.keep_best


def show(config: Config, gpus: list[int], cluster: Cluster, given: Assumptions) -> dict[str, Any]:
    """Prints the plan; returns it as JSON takes it."""
    args = cluster, given.rate, given.usable_bytes
    chosen = {count: best(config, given.num_classes, count, *args) for count in gpus}  # None: nothing fits
    shown = next((c for c in reversed(chosen.values()) if c), None)
    layout = shown.layout if shown else layout_of(config, gpus[0], 3, 1, recompute=True)  # the least that there is
    values: dict[str, Any] = {
        "choices": _show_choices(config, chosen, cluster, given),
        "run": _show_run(config, given),
        "memory": _show_memory(config, layout, given),
        "micro_batches": _show_micro(config, layout, given),
        "communication": _show_communication(config, layout, cluster, given),
    }
    if shown:
        values["loader"] = _show_loader(config, chosen, cluster, given)
        values["saving"] = _show_saving(config, shown, given)
    return values


def _show_choices(
    config: Config, chosen: dict[int, Choice | None], cluster: Cluster, given: Assumptions
) -> list[dict[str, Any]]:
    rows, values = [], []
    for count, choice in chosen.items():
        if choice is None:
            least = least_memory(config, given.num_classes, count)
            rows.append([str(count), f"too large: {least.worst_phase}", "", f"{least.peak / GIB:.1f}", "", "", "", ""])
            values.append({"gpus": count, "fits": False, "least_bytes": least.peak, "worst": least.worst_phase})
            continue
        layout, took = choice.layout, config.total_steps * choice.step.total_s
        cost = took / 3600 * count * given.price_per_gpu_h
        compiled, waits = is_compiled(config, layout), choice.step.waits_for_host
        stage = f"ZeRO {layout.stage}{' e' * (not compiled)}{' h' * waits}"  # the caption explains the marks
        micro = f"{layout.micro_batch} x {layout.accumulation}{' R' * layout.recompute}"
        reached = f"{choice.step.images_per_s:,.0f}", f"{choice.step.mfu:.1%}"
        peak = f"{choice.memory.peak / GIB:.1f}"
        rows.append([str(count), stage, micro, peak, *reached, _days(took), f"{cost:,.0f}"])
        values.append(
            {"gpus": count, "fits": True, **asdict(layout), "peak_bytes": choice.memory.peak}
            | {"images_per_s": choice.step.images_per_s, "step_s": choice.step.total_s, "mfu": choice.step.mfu}
            | {"compiled": compiled, "waits_for_host": waits, "run_s": took, "cost": cost}
        )
    cli.print_table(
        f"{config.name}: {config.model.name}/{config.model.patch_size} on {cluster.device.name}, predicted",
        ["GPUs", "choose", "images", "GiB", "img/s", "MFU", "time", "cost"],
        rows,
        text_columns=(1,),
        caption="images x micro-batches of a step; R: engine.checkpoint_activations; e: not compiled; "
        "h: the GPU waits for the host's launches",
    )
    for count, choice in chosen.items():
        if choice:
            layout = choice.layout
            told = f"engine.zero_stage={layout.stage} engine.max_micro_batch_size={layout.micro_batch}"
            cli.tell(f"{count:6} GPUs: {told}" + " engine.checkpoint_activations=true" * layout.recompute)
    return values


def _show_run(config: Config, given: Assumptions) -> dict[str, Any]:
    params = plain_parameters(config.model, given.num_classes)
    flops = 6 * plain_forward_macs(config.model, given.num_classes)
    batch, images = config.data.global_batch, config.data.global_batch * config.total_steps
    rows = [
        ["parameters", f"{params:,}"],
        ["training GFLOPs per image", f"{flops / 1e9:,.2f}"],
        ["PFLOPs per step", f"{flops * batch / 1e15:,.3f}"],
        ["steps x images", f"{config.total_steps:,} x {batch:,}"],
        ["EFLOPs of the run", f"{flops * images / 1e18:,.2f}"],
    ]
    cli.print_table("The run", ["", ""], rows)
    return {"parameters": params, "flops_per_image": flops, "flops_per_step": flops * batch, "images": images}


def _show_memory(config: Config, layout: Layout, given: Assumptions) -> list[dict[str, Any]]:
    """Prints a layout's memory, and what it would be in the other stages."""
    rows, values = [], []
    for stage in STAGES:
        held = memory(config, given.num_classes, replace(layout, stage=stage))
        parts = held.weights, held.gradients, held.optimizer, held.averages, held.buckets, held.activations
        fits = held.peak <= given.usable_bytes
        cells = [_gib(part) for part in (*parts, held.peak)]
        rows.append([str(stage), *cells, held.worst_phase + " !" * (not fits)])
        values.append({"stage": stage, **asdict(held), "peak": held.peak, "fits": fits})
    cli.print_table(
        f"GiB per GPU on {layout.num_ranks} GPUs, micro-batch {layout.micro_batch}"
        f"{', recomputed' if layout.recompute else ''}",
        ["ZeRO", "weight", "grad", "optim", "avg", "bucket", "activ", "peak", "when"],
        rows,
        text_columns=(8,),
        caption="!: does not fit. Not all live at once",
    )
    return values


def _show_micro(config: Config, shown: Layout, given: Assumptions) -> list[dict[str, Any]]:
    """Prints the memory of other micro-batches than a layout's, plain and recomputed."""
    rows, values = [], []
    seen, count, stage = set(), shown.num_ranks, shown.stage
    for most in reversed(MICRO_BATCHES):
        plain, again = (layout_of(config, count, stage, most, recompute) for recompute in (False, True))
        if plain.micro_batch in seen or (most & (most - 1) and most != plain.micro_batch):
            continue
        seen.add(plain.micro_batch)
        cells, value = [f"{plain.micro_batch} x {plain.accumulation}"], {"micro_batch": plain.micro_batch}
        for layout, name in ((plain, "plain"), (again, "recomputed")):
            saved, start = activation_bytes(config, given.num_classes, layout.micro_batch, layout.recompute)
            peak = memory(config, given.num_classes, layout).peak
            mark = "" if peak <= given.usable_bytes else " !"
            cells += [f"{(saved + start) / GIB:.2f}", f"{peak / GIB:.1f}{mark}"]
            value |= {f"{name}_activations": saved + start, f"{name}_peak": peak}
        rows.append(cells)
        values.append(value)
    cli.print_table(
        f"GiB per GPU on {count} GPUs, ZeRO {stage}",
        ["images", "activations", "peak", "recomputed", "peak"],
        rows,
        caption="!: does not fit",
    )
    return values


def _show_communication(config: Config, layout: Layout, cluster: Cluster, given: Assumptions) -> list[dict[str, Any]]:
    """Prints what a layout sends, and what it would send in the other stages."""
    rows, values = [], []
    for stage in STAGES:
        sent = volume(config, given.num_classes, replace(layout, stage=stage))
        inside = sent.total / cluster.device.link_rate
        outside = sent.total / cluster.network_rate
        used = communication_s(sent, layout.num_ranks, cluster)
        sizes = [f"{part / 1e9:.2f}" for part in (sent.gradients, sent.weights)]
        rows.append([str(stage), *sizes, f"{1000 * inside:.1f}", f"{1000 * outside:.1f}", f"{1000 * used:.1f}"])
        values.append({"stage": stage, **asdict(sent), "nvlink_s": inside, "network_s": outside, "used_s": used})
    cli.print_table(
        f"Sent by each of {layout.num_ranks} GPUs in a step",
        ["ZeRO", "gradients GB", "weights GB", "NVLink ms", "network ms", "counts ms"],
        rows,
        caption="network: where the GPUs fill more than one node; nothing is overlapped",
    )
    return values


def _show_loader(
    config: Config, chosen: dict[int, Choice | None], cluster: Cluster, given: Assumptions
) -> list[dict[str, Any]]:
    rows, values = [], []
    workers = config.data.workers
    for count, choice in chosen.items():
        if choice is None:
            continue
        per_gpu = choice.step.images_per_s / count
        node = per_gpu * min(count, cluster.gpus_per_node)
        cores, has = per_gpu / given.loader_rate, max(1, workers) * given.loader_rate
        enough = "yes" if has >= per_gpu else "no"
        rate = node * given.image_bytes / 1e9
        rows.append(
            [str(count), f"{per_gpu:,.0f}", f"{node:,.0f}", f"{rate:.2f}", f"{cores:.1f}", f"{has:,.0f}", enough]
        )
        values.append({"gpus": count, "per_gpu": per_gpu, "per_node": node, "cores_per_gpu": cores, "has": has})
    cli.print_table(
        f"Images per second that the loader must give (data.workers={workers})",
        ["GPUs", "per GPU", "per node", "GB/s", "cores/GPU", "has/GPU", "enough"],
        rows,
        text_columns=(6,),
    )
    return values


def _show_saving(config: Config, choice: Choice, given: Assumptions) -> dict[str, Any]:
    size, kept = checkpoint_bytes(config, given.num_classes), kept_checkpoints(config)
    every_s = config.checkpoint.every_steps * choice.step.total_s
    rows, values = [], []
    for count in sorted({*GOODPUT_GPUS, choice.layout.num_ranks}):
        mtbf = given.failures.mtbf_s(count)
        interval, wait, behind = _best_interval_s(given, count), given.saves.waits_s(count), given.saves.behind_s(count)
        # A save counts only once it is written: a failure also loses what was trained since its copy.
        failures = replace(given.failures, restart_s=given.failures.restart_s + behind)
        waits = (wait + max(0.0, behind - i) for i in (interval, every_s))  # also until the previous save is written
        at_best, as_is = (goodput(i, waited, failures, count) for i, waited in zip((interval, every_s), waits))
        cells = _span(mtbf), _seconds(wait), _seconds(behind), _span(interval), f"{at_best:.1%}", f"{as_is:.1%}"
        rows.append([f"{count:,}", *cells])
        values.append(
            {"gpus": count, "mtbf_s": mtbf, "waits_s": wait, "behind_s": behind}
            | {"interval_s": interval, "goodput": at_best, "as_set": as_is}
        )
    best_steps = _best_interval_s(given, choice.layout.num_ranks) / choice.step.total_s
    told = f"{size / 1e9:.2f} GB each, {kept} on the disk: {size * kept / 1e9:,.1f} GB"
    cli.print_table(
        f"Checkpoints: {told}",
        ["GPUs", "fails every", "waits", "behind", "save every", "goodput", "as set"],
        rows,
        caption=f"as set: every {_span(every_s)}; on {choice.layout.num_ranks} GPUs "
        f"checkpoint.every_steps={max(1, round(best_steps)):,} loses least",
    )
    return {"checkpoint_bytes": size, "kept": kept, "every_s": every_s, "best_steps": best_steps, "goodput": values}


def _best_interval_s(given: Assumptions, num_gpus: int) -> float:
    """Young's interval, but no shorter than a save takes in the background."""
    young = best_interval_s(given.saves.waits_s(num_gpus), given.failures.mtbf_s(num_gpus))
    return max(given.saves.behind_s(num_gpus), young)


def of_model(config: Config, name: str) -> Config:
    """Returns the config with another model, of 224 pixels."""
    model = {"name": name, "image_size": 224, "pooling": config.model.pooling}
    return config_from_dict({**config_to_dict(config), "model": model}, "plan")


def show_models(config: Config, cluster: Cluster, given: Assumptions, rate_of: Any) -> list[dict[str, Any]]:
    """Prints the choice for each size and number of GPUs, and its rate; returns the rows.

    rate_of: from a config to the Rate of its model.
    """
    values, layouts, rates = [], [], []
    for name in TABLE_MODELS:
        other = of_model(config, name)
        args = cluster, rate_of(other), given.usable_bytes
        chosen = {
            count: best(other, given.num_classes, count, *args) if count <= config.data.global_batch else None
            for count in TABLE_GPUS
        }
        layouts.append([name, *map(_short, chosen.values())])
        rates.append([name, *(_thousands(c.step.images_per_s) if c else "-" for c in chosen.values())])
        for count, choice in chosen.items():
            value: dict[str, Any] = {"model": name, "gpus": count, "fits": choice is not None}
            if choice:
                layout, step = choice.layout, choice.step
                value |= asdict(layout) | {"images_per_s": step.images_per_s, "peak": choice.memory.peak}
                value |= {"compiled": is_compiled(other, layout), "waits_for_host": step.waits_for_host}
            values.append(value)
    header = ["", *(str(count) for count in TABLE_GPUS)]
    caption = "stage:micro-batch, R: with checkpoint_activations, -: does not fit"
    title = f"224 pixels, {config.data.global_batch:,} images a step, {cluster.device.name}, predicted"
    cli.print_table(f"Choice by GPUs; {title}", header, layouts, caption=caption)
    cli.print_table(f"Images per second; {title}", header, rates)
    return values


def _short(choice: Choice | None) -> str:
    return f"{choice.layout.stage}:{choice.layout.micro_batch}{'R' * choice.layout.recompute}" if choice else "-"


def _thousands(value: float) -> str:
    for limit, unit in ((1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.3g}{unit}"
    return f"{value:.3g}"


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}" if size < 100 * GIB else f"{size / GIB:.0f}"


def _days(seconds: float) -> str:
    return f"{seconds / DAY_S:,.1f} d" if seconds >= DAY_S else _span(seconds)


def _seconds(seconds: float) -> str:
    return f"{seconds:,.2g} s" if seconds < 10 else f"{seconds:,.0f} s"


def _span(seconds: float) -> str:
    for size, unit in ((DAY_S, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:.1f} s"
