"""The table of targets: for each kind of file, good ones, hand-made attacks, how it is changed, and what reads it."""

import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random

from tiny import tiny_config

from fuzz import audits, notes, pictures, records, runs, sets, sources, weights
from fuzz.harness import LIMIT_BYTES, Target
from fuzz.mutate import ODD_YAML, changed_bytes, places, with_value
from pretrain.config import config_to_dict, config_to_yaml, load_config
from pretrain.data.reader import BadSample
from pretrain.errors import UserError


def yaml_file(folder: Path) -> Target:
    """A run's config."""
    values = config_to_dict(tiny_config(Path("shards"), Path("runs")))
    good = [config_to_yaml(tiny_config(Path("shards"), Path("runs"))).encode(), (_CONFIGS / "demo.yaml").read_bytes()]
    good.append(config_to_yaml(tiny_config(Path("shards"), Path("runs"), data__train=_MIXTURE)).encode())
    seeds = [
        b"",
        b"\0",
        b"1",
        b"- a",
        b"a",
        b"zz: " + b"[" * 100_000,
        b"zz: " + b"{a: " * 100_000,
        b"\xff\xfe",
        b"? " * 5000,
    ]
    seeds += [
        b"a: &a [x]\n"
        + b"".join(b"%c: &%c [%s]\n" % (c + 1, c + 1, b", ".join([b"*%c" % c] * 9)) for c in range(97, 107))
    ]
    seeds += [
        b"- " * 20_000 + b"a",
        b"x: '" + b"a" * 100_000,
        b"x: !!python/object/apply:os.system [id]",
        b"%YAML 9.9\n---\na: 1",
    ]
    seeds += [
        good[0] + b"---\n" + good[0],
        good[0].replace(b"\n", b"\r"),
        b"name: a\nname: b",
        b"\xef\xbb\xbf" + good[0],
    ]
    slow = [good[0] + b"# " + b"a" * 70 + b"\n" + b"zz: [" + b"{a: 1}, " * 2_000_000 + b"]"]
    odd = [_yaml_with(values, path, text) for path in places(values) for text in ODD_YAML]
    Random(0).shuffle(odd)
    return Target(good, seeds + odd, slow, _changed_yaml, lambda data, own: load_config(_written(own / "a.yaml", data)))


def recipe(folder: Path) -> Target:
    """recipe.yaml in a run's folder: the header of a recipe promises a score."""
    head = b"# A recipe.\n#\n# score: 50 % after 5 days,\n#   measured.\n#\n# Ti | 5 | 50 % | name=run optim.lr=1e-3\n"
    head += b"# B | 5 | 60 % | (this file)\n"
    target, good = runs.recipe(folder), config_to_yaml(tiny_config(Path("shards"), folder, name="run")).encode()
    seeds = [head + b"#" + b" " * 90_000, head * 500 + good, head.replace(b"=1e-3", b"=["), head.replace(b"#", b"# |")]
    return replace(target, good=[head + good, good], seeds=[*seeds, b"\xff" + head, b"", b"\0"], mutate=_changed_yaml)


def overrides(folder: Path) -> Target:
    """KEY=VALUE, one a line."""
    values = config_to_dict(tiny_config(Path("shards"), Path("runs")))
    keys = [".".join(path) for path in places(values) if path and all(isinstance(key, str) for key in path)]
    path = _written(folder / "a.yaml", config_to_yaml(tiny_config(Path("shards"), Path("runs"))).encode())
    again = ("output", "data.train"), ("data.train", "data.val"), ("data.val", "init_from")
    seeds = [
        "\n".join(["name=${output}", *(f"{a}=" + f"${{{b}}}" * 200 for a, b in again), "init_from=" + "a" * 200]),
        "name=" + "[" * 100_000, "name=" + "{a: " * 2000, "optim.lr=" + "9" * 5000, "=", "a", "a.b.c.d=1", "optim=1",
        "optim.lr.x=1",
        "optim.=1", ".=1", "-x=1", "data.train=${data.train}", "name=${name}", "data.crop_area.0=1", "data[train]=a",
        "a" * 100_000 + "=1",
        ".".join("a" * 5000) + "=1", "name=" + "${" * 2000 + "}" * 2000, "name=" + "a" * 1_000_000,
    ]  # fmt: skip
    odd = [f"{key}={text}" for key in keys for text in ODD_YAML]
    Random(0).shuffle(odd)
    encoded = [text.encode("utf-8", "surrogatepass") for text in seeds + odd]

    def call(data: bytes, own: Path) -> None:
        load_config(path, data.decode("utf-8", "surrogateescape").split("\n"))

    def mutate(data: bytes, random: Random) -> bytes:
        lines = [f"{random.choice(keys)}={random.choice(ODD_YAML)}".encode() for _ in range(random.choice((1, 2, 3)))]
        return changed_bytes(b"\n".join(lines), random) if random.random() < 0.5 else b"\n".join(lines)

    return Target([b"optim.lr=1e-3\nname=a"], encoded, [], mutate, call)


def _yaml_with(values: object, path: tuple[str, ...], text: str) -> bytes:
    return json.dumps(with_value(values, path, "@@")).replace('"@@"', text).encode("utf-8", "surrogatepass")


def _changed_yaml(data: bytes, random: Random) -> bytes:
    if random.random() < 0.3:
        return changed_bytes(data, random)
    lines = data.decode("utf-8", "replace").splitlines()
    for _ in range(random.choice((1, 1, 2, 3))):
        at = random.randrange(len(lines)) if lines else 0
        key, colon, _ = lines[at].partition(":") if lines else ("", "", "")
        changed = random.choice(
            (
                [f"{key}{colon} {random.choice(ODD_YAML)}"],
                [lines[at], lines[at]] if lines else [],
                [],
                ["  " + lines[at]] if lines else [],
                [f"{random.choice(ODD_YAML)}: {random.choice(ODD_YAML)}"],
            )
        )
        lines[at : at + 1] = changed
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def _written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


_MIXTURE = [{"path": "a", "weight": 2.0}, {"path": "b", "weight": 1.0}]
_CONFIGS = Path(__file__).resolve().parents[2] / "configs"

# What is made for a target stands in the folder that it is given; inputs are written elsewhere.
TARGETS: dict[str, Callable[[Path], Target]] = {
    "tar_sample": sets.tar_sample,
    "tar_index": sets.tar_index,
    "idx": sets.index,
    "manifest": sets.manifest,
    "classes": sets.classes,
    "class_list": sets.class_list,
    "labels": sets.labels,
    "images": pictures.images,
    "npz": weights.npz,
    "safetensors": weights.safetensors,
    "safetensors_index": weights.safetensors_index,
    "torch_file": weights.torch_file,
    "config_own": weights.config_own,
    "config_timm": weights.config_timm,
    "config_transformers": weights.config_transformers,
    "preprocessor": weights.preprocessor,
    "checkpoint_manifest": weights.checkpoint_manifest,
    "checkpoint_state": weights.checkpoint_state,
    "yaml": yaml_file,
    "overrides": overrides,
    "tfrecord": records.tfrecord,
    "tfds_info": records.tfds_info,
    "metrics": runs.metrics,
    "starts": runs.starts,
    "batch": runs.batch,
    "results": runs.results,
    "wrong": runs.wrong,
    "finetuning": runs.finetuning,
    "source_npz": sets.source_npz,
    "source_tar": sets.source_tar,
    "source_targz": sets.source_targz,
    "source_csv": sources.source_csv,
    "source_jsonl": sources.source_jsonl,
    "source_idx": sources.source_idx,
    "plain_pickle": sources.plain_pickle,
    "class_tars": sources.class_tars,
    "remote_tar": sources.remote_tar,
    "task_tar": sets.task_tar,
    "http_answer": sources.http_answer,
    "task_lists": sources.task_lists,
    "examples": notes.examples,
    "counts": notes.counts,
    "provenance": notes.provenance,
    "unfinished_plan": notes.unfinished_plan,
    "unfinished_shard": notes.unfinished_shard,
    "remote_record": notes.remote_record,
    "task_list": notes.task_list,
    "resume": notes.resume,
    "resume_mixture": partial(notes.resume, mixture=True),
    "card": notes.card,
    "card_scores": notes.card_scores,
    "earlier_results": notes.earlier_results,
    "predictions": notes.predictions,
    "own_accuracy": notes.own_accuracy,
    "run_score": notes.run_score,
    "run_pictures": notes.run_pictures,
    "class_names": notes.class_names,
    "checkpoint_index": weights.checkpoint_index,
    "recipe": recipe,
    **audits.AUDITS,
}


def broken(folder: Path) -> Target:
    """A reader with every fault, by which the harness is tried."""
    kept: list[bytes] = []

    def call(data: bytes, own: Path) -> None:
        match data:
            case b"key":
                raise KeyError("a")
            case b"lines":
                raise BadSample("two\nlines")  # those of the user are one line by construction
            case b"refused":
                raise UserError("one line")
            case b"hidden":
                try:
                    bytearray(1 << 50)
                except MemoryError:
                    raise UserError("cannot be read") from None
            case b"memory":
                kept.append(b"a" * (LIMIT_BYTES + (50 << 20)))
            case b"time":
                while True:
                    pass
            case b"crash":
                os.kill(os.getpid(), signal.SIGSEGV)
            case b"exit":
                os._exit(0)

    words = [b"key", b"lines", b"refused", b"hidden", b"memory", b"time", b"crash", b"exit"]
    return Target([b"good"], words, [], lambda data, random: b"good", call)
