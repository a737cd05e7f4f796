"""The report's files: report.html, a self-contained page; report.md and report.json with the same numbers.

The page has no script, and its policy forbids scripts and outside resources: a run's folder is not trusted.
"""

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pretrain import cli
from pretrain.escape import code_in_markdown, in_markdown, markdown_table, portable, portable_path, shown
from pretrain.report import curves, figures, story
from pretrain.report.batch import Example
from pretrain.report.fewshot import FewShot, fewshot_chart
from pretrain.report.figures import Table, summary
from pretrain.report.runs import Run
from pretrain.storage import write_text

MAX_CARDS = 7  # with more runs, only the table shows them
NAMES = ("report.html", "curves.png", "report.md", "report.json")


def write_report(runs: Sequence[Run], out: Path) -> list[Path]:
    """Writes NAMES into `out` and returns their paths. Raises UserError when it cannot.

    The same runs give the same bytes. The Markdown page shows curves.png by its relative name.
    """
    summaries = [summary(run) for run in runs]
    record = {"format": "pretrain-report", "version": 1, "paper": _paper(), "runs": summaries}
    with cli.writing(out):
        out.mkdir(parents=True, exist_ok=True)
        curves.draw_curves(runs, out / "curves.png")
        pages = {
            "report.html": html(runs, summaries),
            "report.md": markdown(summaries, _missing(runs, summaries)),
            "report.json": json.dumps(_told(record), indent=2, allow_nan=False) + "\n",
        }
        for name, text in pages.items():
            write_text(out / name, text, errors="replace")  # names may hold lone surrogates
    return [out / name for name in NAMES]


_CAPTIONS = {
    "batch": "the first augmented batch",
    "internals": "what it has learned: patch filters, positions, how far its heads look (the ViT paper's figure 7)",
    "rollout": "where it looks: attention rolled out over all blocks (the ViT paper's figure 6)",
}
_PATHS = ("folder", "path", "weights", "command")  # keys whose values are paths or contain them


def _told(value: Any, key: str = "") -> Any:
    """Returns the value for report.json: paths do not reveal whose disk it was; null for NaN, which JSON lacks."""
    if isinstance(value, dict):
        return {name: _told(item, name) for name, item in value.items()}
    if isinstance(value, list):
        return [_told(item, key) for item in value]
    if isinstance(value, str):
        return portable_path(value) if key in _PATHS and value.startswith("/") else portable(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _paper() -> list[dict[str, Any]]:
    return [
        {**asdict(row), "scores": {task: round(score / 100, 6) for task, score in row.scores.items()}}
        for row in (*figures.REFERENCES, *figures.VTAB_REFERENCES)
    ]


# --- shared by both pages --------------------------------------------------------------------------------------------


def _missing(runs: Sequence[Run], summaries: Sequence[dict[str, Any]]) -> dict[str, dict[str, str]]:
    """Returns, by part of the page, a note on what no run has, and the command that adds it."""
    run = shlex.quote(portable(str(runs[0].folder), whole=True))
    finetune = f"python tools/finetune.py {run} --task"
    evaluate = f"python tools/evaluate.py {run}"
    metrics = {metric for r in runs for metric in r.curves}
    evaluated = {row["metric"] for r in runs if r.evaluation for row in r.evaluation["rows"]}
    tuned = all(r.config and r.config.init_from for r in runs)  # the transfer of fine-tuned runs is of no interest
    finetuned = any(r.finetuning or (r.config and r.config.init_from) for r in runs)
    have = {
        "validation": "val/top1" in metrics,
        "fewshot": tuned or any("shot" in metric for metric in metrics | evaluated),
        "scores": tuned or any(s["scores"] for s in summaries) or not finetuned,
        "finetuning": finetuned,
        "evaluation": any(r.evaluation for r in runs),
        "pictures": any(p.name != "batch" for r in runs for p in r.pictures),
        "wrong": any(r.wrong.number for r in runs),
    }
    lines = {
        "validation": ("Never validated: data.val=MANIFEST or data.held_out=COUNT lets a run do so.", ""),
        "fewshot": ("No few-shot accuracy over steps; of the last one:", f"{evaluate} --fewshot TRAIN TEST"),
        "scores": ("No run has a score of the paper's table yet.", f"{finetune} imagenet"),
        "finetuning": ("Nothing was fine-tuned yet.", f"{finetune} cifar100"),
        "evaluation": ("Not evaluated yet.", f"{evaluate} --val MANIFEST --fewshot TRAIN TEST --baselines"),
        "pictures": ("No pictures of what was learned yet.", f"python tools/visualize.py {run} --image PHOTO"),
        "wrong": ("No wrong predictions were kept (evaluation/wrong.json).", f"{evaluate} --val MANIFEST"),
    }
    return {part: {"text": text, "command": command} for part, (text, command) in lines.items() if not have[part]}


def _facts(values: dict[str, Any]) -> dict[str, str]:
    """Returns the known facts about a run's settings and environment, by name."""
    versions = ", ".join(f"{name} {version}" for name, version in (values["versions"] or {}).items())
    facts = {
        "folder": portable_path(values["folder"]),
        "model": values["model"],
        "command": portable(" ".join(map(str, values["command"] or []))),
        "restarts": _restarts(values),
        "goodput": _goodput(values["goodput"]),
        "ranks of each start": ", ".join(map(str, values["ranks"])),
        "commit": values["commit"],
        "versions": versions,
    }
    return {name: str(fact) for name, fact in facts.items() if fact}


def _goodput(share: float | None) -> str:
    rest = "the rest into starts, steps done again, validation, saves"
    return f"{share:.1%} of the time went into steps that count, {rest}" if share else ""


def _restarts(values: dict[str, Any]) -> str:
    """Returns the number of restarts, and of the steps that they repeated."""
    if not values["restarts"]:
        return ""
    again = "" if values["lost_steps"] is None else f", {values['lost_steps']:,} steps done again"
    return f"{values['restarts']:,}{again}"


def _shared_facts(summaries: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Returns the facts that are the same for all of several runs."""
    first, *others = map(_facts, summaries)
    return {name: fact for name, fact in first.items() if others and all(of.get(name) == fact for of in others)}


def caption(picture: str) -> str:
    """Returns the caption of a run's picture by its name, which may end in the digest of older weights."""
    known, _, digest = picture.partition("-")
    if known not in _CAPTIONS:
        return picture.replace("_", " ")
    return _CAPTIONS[known] + (f"; weights {digest}" if digest else "")


def _batches(runs: Sequence[Run]) -> list[tuple[str, list[Example]]]:
    """Returns each distinct first batch once, with the names of the runs that began with it."""
    found: dict[tuple[Example, ...], list[str]] = {}
    for run in runs:
        if run.batch:
            found.setdefault(tuple(run.batch), []).append(run.name)
    return [(", ".join(names), list(batch)) for batch, names in found.items()]


# --- HTML ------------------------------------------------------------------------------------------------------------


def template(name: str) -> Any:
    """Returns a template of this folder, with autoescaping of everything it shows."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined  # 0.1 s to import

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,  # of everything: names of runs, classes and files are untrusted
        finalize=_harmless,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(name)


def _fewshot_chart(evaluation: dict[str, Any]) -> FewShot | None:
    """Returns the chart of the first record that has one and does not belong to other weights."""
    records = [record for record in (evaluation, *evaluation["others"]) if not record["is_of_others"]]
    return next(filter(None, (fewshot_chart(record["rows"]) for record in records)), None)


def html(runs: Sequence[Run], summaries: Sequence[dict[str, Any]]) -> str:
    """Returns the page, which refers to no other file."""
    panels = curves.draw_panels(runs)
    charts = {number: _fewshot_chart(run.evaluation) for number, run in enumerate(runs) if run.evaluation}
    fewshots = {number: chart for number, chart in charts.items() if chart}
    by_title = {panel.title: panel for panel in panels}
    return template("page.html.jinja").render(
        runs=list(zip(runs, summaries)),
        missing=_missing(runs, summaries),
        facts=_facts,
        shared_facts=_shared_facts(summaries),
        batches=_batches(runs),
        figures=figures,
        story=story,
        caption=caption,
        portable=portable,
        fewshots=fewshots,
        first_fewshot=next(iter(fewshots), None),
        panels=panels,
        first_panel=by_title.get("Top-1 accuracy") or by_title.get("Loss"),
        log_steps=curves.differ_in_length(runs),
        curves=curves,
        MAX_CARDS=MAX_CARDS,
    )


def _harmless(value: Any) -> Any:
    """Escapes characters that change the writing direction and the like; keeps the line breaks of a config."""
    return "\n".join(map(shown, value.split("\n"))) if type(value) is str else value  # Markup is a subclass of str


# --- Markdown --------------------------------------------------------------------------------------------------------


def markdown(
    summaries: Sequence[dict[str, Any]], missing: Mapping[str, Mapping[str, str]] = MappingProxyType({})
) -> str:
    """Returns the page: the tables of all runs, then the facts and the evaluations of each."""
    lines = ["# Report", ""]
    for values in summaries:
        result = story.headline(values)
        told = f" **{in_markdown(result[0])}** {in_markdown(result[1])}." if result else ""
        lines += [f"- {in_markdown(values['run'])}: {in_markdown(values['sentence'])}{told}"]
    lines += ["", "![Curves](curves.png)", "", *_lines(figures.overview_table(summaries))]
    lines += [*_hint(missing, "validation"), *_hint(missing, "fewshot")]
    if any(values["scores"] for values in summaries):
        lines += ["", "## Beside the paper", "", *_lines(figures.paper_table(summaries))]
    lines += _hint(missing, "scores")
    if (vtab := figures.vtab_table(summaries)).rows:
        lines += ["", "### VTAB, task by task", "", *_lines(vtab)]
    for target in figures.targets(summaries):
        names, recipe, score = map(in_markdown, (", ".join(target["runs"]), target["recipe"], target["score"]))
        lines += ["", f"Target of {names} ({recipe}): {score}"]
    lines += ["", "## What was left out", "", *_lines(figures.losses_table(summaries))]
    if any(values["finetuning"] for values in summaries):
        lines += ["", "## Fine-tuning", "", *_lines(figures.finetuning_table(summaries))]
    lines += [*_hint(missing, "finetuning"), *_hint(missing, "evaluation")]
    for values in summaries:
        lines += ["", f"## {in_markdown(values['run'])}", ""]
        lines += [f"- {name}: {in_markdown(fact)}" for name, fact in _facts(values).items()]
        if values["starts"]:
            lines += ["", *_lines(figures.starts_table(values))]
        for record in figures.evaluations(values):
            lines += ["", f"Evaluation of {in_markdown(figures.of_record(record))}:", ""]
            lines += _lines(figures.evaluation_table(record["rows"]))
        if confused := values["wrong_predictions"]["confused"]:
            pairs = (f"{of['label']} for {of['predicted']} ({of['count']:,} of {of['of']:,})" for of in confused)
            of = figures.of_wrong(values["wrong_predictions"])
            lines += ["", in_markdown(f"Taken for another class most often{of}: {'; '.join(pairs)}.")]
    if (configs := figures.config_table(summaries)).rows:
        lines += ["", "## Differs from the defaults", "", *_lines(configs)]
    return "\n".join(lines) + "\n"


def _hint(missing: Mapping[str, Mapping[str, str]], part: str) -> list[str]:
    if part not in missing:
        return []
    command = missing[part]["command"]
    return ["", in_markdown(missing[part]["text"]) + (f" {code_in_markdown(command)}" if command else "")]


def _lines(table: Table) -> list[str]:
    return markdown_table(table.header, table.rows, table.text_columns)
