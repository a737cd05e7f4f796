"""A model card: what the weights are, how they were made, what they scored, and how to load them, as Markdown."""

import hashlib
import math
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from pretrain.checkpoint.read import read_state
from pretrain.config import MINUS_ONE_TO_ONE, Config, config_from_dict, model_name, non_defaults
from pretrain.escape import code_in_markdown, in_markdown, shown
from pretrain.json_files import Fields, brief
from pretrain.models.formats import OF_RUN
from pretrain.models.tensors import Weights, read_fields, readable
from pretrain.models.weights import results_folder, weights_sha256

_MOST = 1 << 40  # images
_LARGEST = 1e9  # score; the loss of weights that diverged may be any number, or none
_MAX_LETTERS = 200  # of a name that others wrote
_RECEIPT = {
    "seed": "seed",
    "global_batch": "global batch",
    "steps": "steps",
    "samples_seen": "samples seen",
    "skipped_steps": "steps skipped",
}


def model_card(
    weights: Weights,
    target: str,
    *,
    title: str,
    command: str,
    versions: Mapping[str, str],
    loading: str,
    proof: str,
    licence: str | None = None,
    without: Collection[str] = (),
) -> str:
    """Returns the card. It has recipe, data and scores if the source is a checkpoint of ours.

    loading: Python lines; proof: what the verification found; licence: the hub's word for it, such as apache-2.0;
    without: "head", "pre_logits", where these parts of the source were left out. Scores are those of the function that
    is written: at its size, and without a head those of its features.
    """
    place = weights.source / "state.json"
    state = Fields(read_state(weights.source) if place.is_file() else {}, str(place))
    results = _results(weights, without)
    parts = [
        _front(weights, target, title, licence, results),
        f"# {title}",
        _model(weights, target),
        f"```python\n{loading}\n```",
    ]
    scores = []
    if state.values:
        with readable(place):
            config = config_from_dict(state.part("config").values, str(place))
            parts += ["## Recipe", _recipe(config, state), "## Data", _data(config, state)]
            of_average = weights.of_run != "trained"  # what was validated, where the run keeps one
            if weights.num_classes and weights.model.image_size == config.model.image_size and of_average:
                scores += _validation(state)
    if scores := [*scores, *_evaluation(results)]:
        parts += ["## Scores", "\n".join(scores)]
    used = ", ".join(f"{name} {version}" for name, version in versions.items())
    parts += ["## Conversion", f"```\n{command}\n```", proof, f"Versions: {used}."]
    return "\n\n".join(parts) + "\n"


def _front(weights: Weights, target: str, title: str, licence: str | None, results: Fields | None) -> str:
    """What Hugging Face's pages read: kind, library, licence, and results as the hub lists them."""
    from huggingface_hub import EvalResult, ModelCardData  # only where a card is written

    task = "image-classification" if weights.num_classes else "image-feature-extraction"
    data = results.values.get("data") if results else None
    found = []
    for row in results.parts("rows") if results else ():
        job, _, metric = shown(row.text("metric")).rpartition("/")
        value = row.number("value", -_LARGEST, _LARGEST)
        if row.text("model") == "trained" and not metric.endswith("-std"):
            found.append(
                EvalResult(
                    task_type=task,
                    dataset_type=job or "own",
                    dataset_name=job or "own data",
                    dataset_args=_digests(data, f"{job}/" if job else "fewshot_" if "-shot" in metric else "val"),
                    metric_type="accuracy" if metric.startswith("top") or metric.endswith(("shot", "-nn")) else metric,
                    metric_name=metric,
                    metric_value=value,
                )
            )
    card = ModelCardData(
        library_name=target if target in ("timm", "transformers", "onnx") else None,  # those that the hub knows
        license=licence,
        pipeline_tag=task,
        tags=["vision-transformer"],
        model_name=title if found else None,
        eval_results=found or None,
    )
    return f"---\n{card.to_yaml()}\n---"


def _digests(data: Any, role: str) -> dict[str, str]:
    """The SHA-256 of the manifests whose names in results.json begin with `role`."""
    return {
        f"{shown(key)}_manifest_sha256": shown(entry["sha256"])
        for key, entry in (data if isinstance(data, dict) else {}).items()
        if key.startswith(role) and isinstance(entry, dict) and isinstance(entry.get("sha256"), str)
    }


def _model(weights: Weights, target: str) -> str:
    config = weights.model
    millions = sum(math.prod(tensor.shape) for tensor in weights.tensors.values()) / 1e6
    named = f"{weights.num_classes} classes" if weights.num_classes else "no head: it returns features"
    lines = [f"Vision Transformer ([arXiv 2010.11929](https://arxiv.org/abs/2010.11929)), {millions:.1f}M parameters."]
    if config.timm_name is not None:
        lines = [f"timm's {config.timm_name}, {millions:.1f}M parameters."]
    else:
        width, depth, mlp_dim, heads = config.shape
        lines.append(
            f"{model_name(config, with_size=False)}: width {width}, depth {depth}, MLP {mlp_dim}, {heads} heads;"
        )
        lines.append(f"pooling {config.pooling}, positions {config.positions}, {config.gelu} GELU.")
        if form := config.other_form():
            lines.append(f"Blocks of another form ([arXiv 2302.05442](https://arxiv.org/abs/2302.05442)): {form}.")
        if config.layer_scale is not None:
            lines.append(
                f"LayerScale ([arXiv 2103.17239](https://arxiv.org/abs/2103.17239)), from {config.layer_scale}."
            )
    range_of = "RGB in [-1, 1]"
    if weights.normalisation != MINUS_ONE_TO_ONE and target not in ("npz", "onnx"):
        range_of = f"RGB in [0, 1] less mean {list(weights.mean)}, divided by {list(weights.std)}"
    if weights.of_run is not None:
        lines.append(f"These are {OF_RUN[weights.of_run]}.")
    lines.append(f"Input {config.image_size} x {config.image_size} pixels, {range_of}; {named}.")
    lines.append(f"Evaluation transform {weights.eval_transform}, {weights.interpolation} resizing;")
    lines.append(f"probabilities by {weights.loss or 'softmax; the loss of its training is not known'}.")
    return "\n".join(lines)


def _recipe(config: Config, state: Fields) -> str:
    begun = f"Step {state.integer('step', 0, _MOST)} of {config.total_steps}. Settings that differ from the defaults:"
    return "\n".join(
        [begun, "", *(f"- {code_in_markdown(f'{key}={value}')}" for key, value in changed_settings(config))]
    )


def changed_settings(config: Config) -> Iterator[tuple[str, Any]]:
    """Yields (key, value) of each setting that is not its default; paths of this machine are left out."""
    for key, value in non_defaults(config):
        if not isinstance(value, Path) and key != "data.train":
            yield key, list(value) if isinstance(value, tuple) else value


def _data(config: Config, state: Fields) -> str:
    data = state.part("data") if state.values.get("data") else Fields({}, state.source)
    order = data.part("order") if data.values.get("order") else Fields({}, data.source)
    if config.data.is_mixture:
        return _mixture(order) + _receipt(state)
    sha256 = order.text("manifest_sha256", "")
    path = config.data.train
    folder = path.parent if path.suffix == ".json" else path
    facts = [code_in_markdown(folder.name)]
    if sha256:
        facts.append(f"manifest SHA-256 {code_in_markdown(sha256[:_MAX_LETTERS])}")
    manifest = folder / (path.name if path.suffix == ".json" else "manifest.json")
    if manifest.is_file() and hashlib.sha256(text := manifest.read_bytes()).hexdigest() == sha256:
        values = Fields.parse(text, str(manifest))
        facts.append(f"{values.integer('num_samples', 0, _MOST):,} samples")
    return ", ".join(facts) + "." + _receipt(state)


def _mixture(order: Fields) -> str:
    """The sources of a mixture; the shares that each had are the phases' quotas."""
    phases = [(phase.integer("step", 0, _MOST), phase.values.get("quotas")) for phase in order.parts("phases", ())]
    shares = "; ".join(f"from step {step} on {in_markdown(brief(quotas))}" for step, quotas in phases)
    sources = [
        f"{in_markdown(source.text('name'))}, {source.integer('num_samples', 0, _MOST):,} samples, manifest SHA-256 "
        f"`{in_markdown(source.text('manifest_sha256'))}`"
        for source in order.parts("sources", ())
    ]
    return f"A mixture of {'; '.join(sources)}. Shares: {shares}."


def _receipt(state: Fields) -> str:
    """What tools/audit.py adds up again; checkpoints of earlier versions have none."""
    if not state.values.get("receipt"):
        return ""
    told = state.part("receipt")
    counts = told.part("bad_samples")
    bad = {reason: count for reason in counts.values if (count := counts.integer(reason, 0, 1 << 63, 0))}
    reasons = f" ({', '.join(f'{count} {in_markdown(reason)}' for reason, count in bad.items())})" if bad else ""
    numbers = {key: told.integer(key, 0, 1 << 63) for key in (*_RECEIPT, "held_out", "damaged_samples")}
    subset = f"a subset of {told.integer('subset', 1, 1 << 63):,}, " if told.values.get("subset") else ""
    copies = told.integer("repeats", 1, 1 << 63, 1)
    repeats = f"each image {copies:,} times in its step, " if copies > 1 else ""
    return (
        f"\nReceipt: order {in_markdown(told.text('name'))} {in_markdown(told.text('version'))}, "
        + ", ".join(f"{name} {numbers[key]:,}" for key, name in _RECEIPT.items())
        + f"; {subset}{repeats}held out {numbers['held_out']:,}, bad {sum(bad.values()):,}{reasons}, used though "
        f"damaged {numbers['damaged_samples']:,}. `tools/audit.py RUN` adds it up again."
    )


def _validation(state: Fields) -> Iterator[str]:
    for name, value in (state.part("metrics").values if state.values.get("metrics") else {}).items():
        if isinstance(value, float) or (type(value) is int and abs(value) <= _MOST):  # null: it was not finite
            yield f"- {_escaped(name)} {value:.4g} (at the end of this checkpoint's step)"


def _results(weights: Weights, without: Collection[str]) -> Fields | None:
    """What tools/evaluate.py measured of these weights, beside the run of a checkpoint or in a converted folder.

    Without rows beyond _LARGEST or not finite, as a loss may be: no card has a place for them.
    """
    folder = results_folder(weights.source, "evaluation").parent
    if not (folder / "evaluation" / "results.json").is_file():
        return None
    last = read_fields(folder, "evaluation/results.json")
    identity = (weights_sha256(weights.source, weights.of_run), weights.model.image_size)
    for record in (last, *last.parts("others", ())):
        if (record.values.get("weights_sha256"), record.values.get("image_size")) == identity:
            rows = [row.values for row in record.parts("rows") if _still_holds(row.text("metric"), without)]
            rows = [row for row in rows if not _diverged(row.get("value"))]
            return Fields({**record.values, "rows": rows}, record.source)
    return None


def _diverged(value: object) -> bool:
    return isinstance(value, int | float) and not abs(value) <= _LARGEST  # NaN included


def _still_holds(metric: str, without: Collection[str]) -> bool:
    """Whether a score holds for what is written: features are the head's input, made by the representation layer."""
    is_of_features = ":" in metric or "-shot" in metric
    return "pre_logits" not in without and (is_of_features or "head" not in without)


def _evaluation(results: Fields | None) -> Iterator[str]:
    if results is None:
        return
    name = code_in_markdown(Path(results.text("weights")).name)
    for row in results.parts("rows"):
        about = [_escaped(value) for key, value in row.values.items() if key not in ("metric", "value", "n") and value]
        value, images = row.number("value", -_LARGEST, _LARGEST), row.integer("n", 0, _MOST)
        told = f" ({', '.join(about)})" if about else ""
        yield f"- {_escaped(row.text('metric'))} {value:.4g} on {images:,} images{told}, measured on {name}"


def _escaped(value: object) -> str:
    """What others wrote, shortened and escaped for Markdown."""
    return in_markdown(str(value)[:_MAX_LETTERS])
