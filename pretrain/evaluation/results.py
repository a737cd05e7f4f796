"""Results of an evaluation: rows and the record to repeat them, merged with an earlier call's, as pages and files."""

import fcntl
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from pretrain import cli
from pretrain.config import model_name
from pretrain.errors import UserError
from pretrain.escape import in_markdown, markdown_table, portable, portable_path, shown
from pretrain.evaluation.evaluators import EVALUATORS, Row, in_words
from pretrain.evaluation.jobs import Done
from pretrain.evaluation.names import HEAD
from pretrain.evaluation.predictions import confusion, lines, wrong_items
from pretrain.evaluation.subject import Subject, transform_of
from pretrain.json_files import Fields
from pretrain.log import not_a_link, warn
from pretrain.models.formats import told_of_run
from pretrain.models.weights import Weights
from pretrain.provenance import versions
from pretrain.storage import replacing, write_text


class Measured(NamedTuple):
    """What was measured: the rows mean nothing without it."""

    subject: Subject
    weights: Weights
    digest: str  # weights_sha256


def write_results(
    out: Path, predictions: Path | None, measured: Measured, done: list[Done], failed: dict[str, str]
) -> None:
    """Merges the jobs done so far into a folder of results, and writes their predictions where that is asked for.

    Called after each job, since a later one may end the command; files are replaced whole. Raises UserError when one
    cannot be written.
    """
    rows = [row for _, _, found in done for row in found.rows]
    with one_at_a_time(out):
        rows, record = with_earlier(rows, record_of(measured, done, failed), out / "results.json")
        set_aside(out, measured.digest)
        write_pages(out, pages(rows, record, done))
    if predictions:
        write_predictions(predictions, done)


# --- the record ------------------------------------------------------------------------------------------------------


def record_of(measured: Measured, done: list[Done], failed: dict[str, str]) -> dict[str, Any]:
    """Returns what is needed to repeat the rows."""
    subject, weights, digest = measured
    return {
        "format": "pretrain-evaluation",
        "version": 1,
        "weights": str(weights.source),
        "weights_sha256": digest,
        **({"of_run": weights.of_run} if weights.of_run else {}),
        "model": model_name(weights.model, with_size=False),
        "image_size": subject.image_size,
        "num_classes": subject.num_classes,
        "loss": subject.loss,
        "transform": transform_of(subject.own),
        "data": {
            job.roles[role]: {
                "path": str(manifest.path),
                "sha256": manifest.sha256,
                "num_samples": manifest.num_samples,
                "num_classes": manifest.num_classes,
            }
            for job, sets, _ in done
            for role, (manifest, _) in sets.items()
        },
        **_protocols(subject, done),
        "failed": failed,
        "versions": versions(),
    }


def _protocols(subject: Subject, done: list[Done]) -> dict[str, dict[str, Any] | None]:
    """Returns the protocol of each kind of evaluation that was done, with the values it chose; None for the others."""
    found: dict[str, dict[str, Any] | None] = {}
    for kind, evaluator in EVALUATORS.items():
        if evaluator.protocol is None:
            continue
        of_kind = [(job, result) for job, _, result in done if job.kind == kind]
        values = evaluator.protocol(subject)
        for job, result in of_kind:
            for key, value in result.chosen.items():
                values.setdefault(key, {})[job.name] = value
        found[kind] = values if of_kind else None
    return found


# --- merged with an earlier call's -----------------------------------------------------------------------------------

_LETTERS = 12  # of a digest, in a file's name and on a page
_MOST = 1 << 53  # every reader of JSON keeps whole numbers up to here exact
# The same for all rows of one set of weights.
SHARED = {"loss": "loss", "transform": "transform", "image_size": "image size"}


@contextmanager
def one_at_a_time(out: Path) -> Iterator[None]:
    """Holds the folder's lock for the block: other writers, such as a job array's elements, wait until it has ended.

    Warns where the file system gives no locks. Raises UserError where the folder cannot be written.
    """
    with cli.writing(out):
        out.mkdir(parents=True, exist_ok=True)
        file = open(out / ".lock", "a", opener=not_a_link)
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX)
        except OSError as error:
            warn(f"{out}: no locks on its file system ({error.strerror}); do not run two commands that write there")
        yield


def with_earlier(rows: list[Row], record: dict[str, Any], path: Path) -> tuple[list[Row], dict[str, Any]]:
    """Returns the still valid rows of an earlier call, then the new ones, and the record needed to repeat both.

    An earlier row of the same weights is still valid unless it was measured again or its data set or protocol has
    changed; a warning names the rows dropped for a change. Records of other weights are kept as they are in the
    record's "others": two checkpoints of a run share a folder, and so do X.npz and X.
    """
    if not path.is_file():
        return rows, record
    record = json.loads(json.dumps(record))  # tuples become lists, as in the file
    try:
        records = _records(Fields.read(path))
        mine = [each for each in records if each.values.get("weights_sha256") == record["weights_sha256"]]
        if others := [each.values for each in records if each not in mine]:
            record["others"] = others
        merged, dropped = _with_rows(rows, record, mine[0]) if mine else ((rows, record), "")
        _results_page(*merged).encode()  # malformed earlier records fail here, before they are kept
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        warn(f"{path}: cannot be read as an earlier call's ({error!r}); replaced")
        record.pop("others", None)
        return rows, record
    if dropped:
        warn(f"{path}: {dropped}")
    return merged


def _records(top: Fields) -> list[Fields]:
    """Returns the record of the last call and those of other weights, after parsing the rows of each."""
    others = top.parts("others", ())
    found = [Fields({key: value for key, value in top.values.items() if key != "others"}, top.source), *others]
    for each in found:
        for row in each.parts("rows"):
            _row(row)
    return found


def _with_rows(rows: list[Row], record: dict[str, Any], fields: Fields) -> tuple[tuple[list[Row], dict[str, Any]], str]:
    """Returns rows and record merged with an earlier call's on the same weights; and, in words, which are dropped."""
    earlier, found = fields.values, [_row(entry) for entry in fields.parts("rows")]
    differ = [name for key, name in SHARED.items() if earlier.get(key) != record[key]]
    again = {(row.model, row.metric) for row in rows}
    remaining = [row for row in found if (row.model, row.metric) not in again]
    kept = [row for row in remaining if not differ and _holds(row, earlier, record)]
    told = ""
    if dropped := [row.metric for row in remaining if row not in kept]:
        why = f"other {', '.join(differ) or 'data or protocol'}"
        told = f"{len(dropped)} rows of an earlier call are dropped ({why}): {', '.join(dropped)}"
    return ([*kept, *rows], _merged_record(kept, earlier, record)), told


def _row(entry: Fields) -> Row:
    value = entry.values.get("value")
    if not isinstance(value, float):  # a loss may be NaN
        value = entry.number("value", -_MOST, _MOST)
    return Row(entry.text("model"), entry.text("metric"), value, entry.integer("n", 0, _MOST))


def _holds(row: Row, earlier: dict[str, Any], record: dict[str, Any]) -> bool:
    """Returns whether the new record has the same data sets and protocol for a row as the earlier one, or none."""
    kind, roles = _origin(row)
    grows = EVALUATORS[kind].grows if kind in EVALUATORS else ()
    data, protocol = [], []
    for values in (earlier, record):
        data.append({role: of["sha256"] for role, of in values["data"].items() if role.startswith(roles)})
        protocol.append({key: value for key, value in (values.get(kind) or {}).items() if key not in grows})
    return all(not now or now == before for before, now in (data, protocol))


def _origin(row: Row) -> tuple[str, str]:
    """Returns a row's kind of evaluation, and the prefix of its data sets' names in results.json."""
    name, _, metric = row.metric.rpartition("/")
    kind, colon, _ = name.partition(":")
    if not colon:
        kind = "fewshot" if "-shot" in metric else HEAD
    return kind, f"{name}/" if name else "fewshot_" if kind == "fewshot" else "val"


def _merged_record(kept: list[Row], earlier: dict[str, Any], record: dict[str, Any]) -> dict[str, Any]:
    """Returns the record with the data sets and protocols of the rows that were kept."""
    kinds, roles = zip(*map(_origin, kept)) if kept else ((), ())
    data = {role: of for role, of in earlier["data"].items() if role.startswith(tuple(roles))}
    merged = {**record, "data": data | record["data"]}
    for kind, evaluator in EVALUATORS.items():
        if evaluator.protocol is None or kind not in kinds:
            continue
        before, now = earlier[kind], record[kind] or {}
        merged[kind] = before | now
        for key in evaluator.grows:
            merged[kind][key] = _grown(before[key], now.get(key))
    return merged


def _grown(before: Any, now: Any) -> Any:
    """Returns the union of two lists of numbers, or of two dicts."""
    if isinstance(before, dict):
        return before | (now or {})
    return sorted({*before, *(now or [])})


# --- tables and pages ------------------------------------------------------------------------------------------------


def table_of(rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    """Returns header and lines of the rows' table: one line per metric, one column per model."""
    models = list(dict.fromkeys(row.model for row in rows))
    values = {(row.model, row.metric): row for row in rows}
    found = []
    for metric in dict.fromkeys(row.metric for row in rows if not row.metric.endswith("-std")):
        of_models = [values.get((model, metric)) for model in models]
        spread = [values.get((model, f"{metric}-std")) for model in models]
        cells = [_cell(row, std) for row, std in zip(of_models, spread)]
        found.append([metric, *cells, f"{next(row.n for row in of_models if row):,}"])
    return ["metric", *models, "images"], found


def _cell(row: Row | None, std: Row | None) -> str:
    if row is None:
        return ""
    if row.metric.endswith(("loss", "quadratic_kappa")):
        return f"{row.value:.4f}"
    return f"{row.value:.2%}" + (f" ± {100 * std.value:.2f}" if std else "")


def pages(rows: list[Row], record: dict[str, Any], done: list[Done]) -> dict[str, str | None]:
    """Returns the content of each results file by name; None: the file is to be removed.

    wrong.json is about the first data set of the last call that scored the head.
    """
    found: dict[str, str | None] = {}
    scored = [one for one in done if one.found.predictions is not None]
    if scored:
        found["wrong.json"] = json.dumps(_wrong(scored[0], record["weights_sha256"]))
    elif not any(_origin(row)[0] == HEAD for row in rows):  # nor has an earlier call left any
        found["wrong.json"] = None
    found["results.md"] = _results_page(rows, record)
    found["results.json"] = json.dumps({**record, "rows": [row._asdict() for row in rows]}, indent=2)
    return found


def _wrong(done: Done, digest: str) -> dict[str, Any]:
    """Returns the content of wrong.json, which names the data and the weights it is about."""
    manifest, predictions = done.sets["test"].manifest, done.found.predictions
    assert predictions is not None
    folder = "/".join(manifest.path.absolute().parent.parts[-2:])  # "imagenet/val": "val" alone names no set
    return {
        "data": shown(done.job.name or folder),
        "data_sha256": manifest.sha256,
        "weights_sha256": digest,
        "items": wrong_items(predictions, manifest),
        **confusion(predictions, manifest),
    }


def _results_page(rows: list[Row], record: dict[str, Any]) -> str:
    """The last call's weights first, then the others."""
    others = [([_row(Fields.of(row, "")) for row in other["rows"]], other) for other in record.get("others", ())]
    return "\n\n".join(_markdown(*each) for each in [(rows, record), *others])


def _markdown(rows: list[Row], record: dict[str, Any]) -> str:
    digest = in_markdown(str(record.get("weights_sha256", "not known"))[:_LETTERS])
    which = told_of_run(record.get("of_run"))
    text = [
        f"# {in_markdown(portable_path(record['weights']))}",
        "",
        f"Model {in_markdown(record['model'])} at {record['image_size']} px, weights {digest}{which}.",
        "",
    ]
    text += [*markdown_table(*table_of(rows)), ""]
    text += [
        f"- {in_markdown(role)}: {in_markdown(portable_path(of['path']))}, {of['num_samples']:,} images"
        for role, of in record["data"].items()
    ]
    text.append(f"- images as evaluation={in_words(record['transform'])} shows them")
    for kind, evaluator in EVALUATORS.items():
        if protocol := record.get(kind):
            text += [f"- {line}" for line in evaluator.told(protocol)]
    text += [f"- **not scored**: {in_markdown(portable(reason))}" for reason in record["failed"].values()]
    return "\n".join(text)


# --- files -----------------------------------------------------------------------------------------------------------


def set_aside(out: Path, digest: str) -> None:
    """Renames wrong.json of other weights to wrong-DIGEST.json, and that of the weights `digest` back to wrong.json.

    wrong.json is about the weights that results.json begins with. Raises UserError when a file cannot be renamed.
    """
    wrong = out / "wrong.json"
    try:
        before = Fields.read(out / "results.json").text("weights_sha256")
    except (OSError, UserError):
        return  # whose wrong.json is, is not known
    if before == digest:
        return
    with cli.writing(out):
        if wrong.is_file() and re.fullmatch("[0-9a-f]{64}", before):
            wrong.replace(out / f"wrong-{before[:_LETTERS]}.json")
        if (own := out / f"wrong-{digest[:_LETTERS]}.json").is_file():
            own.replace(wrong)


def write_pages(out: Path, contents: dict[str, str | None]) -> None:
    """Writes the files into a folder; those whose content is None are removed. Raises UserError when that fails."""
    with cli.writing(out):
        out.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            if content is not None:
                write_text(out / name, content + "\n")
            elif (out / name).exists():
                warn(f"{out / name}: removed, since it is of nothing in results.json any more")
                (out / name).unlink()


def write_predictions(path: Path, done: list[Done]) -> None:
    """Writes a line of JSON for each image that the head was scored on. Raises UserError when that fails."""
    with cli.writing(path, "--predictions"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
            for job, sets, found in done:
                if found.predictions is not None:
                    file.writelines(lines(found.predictions, sets["test"].manifest, job.name or "val"))
