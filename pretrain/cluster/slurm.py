"""SLURM's variables for ranks: a script under plain `srun` learns its rank and the world size. Imports no torch."""

import re
from collections.abc import Mapping

from pretrain.errors import UserError

_FIRST_SPECIAL_STEP = 0xFFFFFFF0  # from here on: batch script, interactive shell and the like, which are no tasks


def is_task(environment: Mapping[str, str]) -> bool:
    """Returns whether this process is a task that srun has started."""
    step = environment.get("SLURM_STEP_ID", "")
    return step.isdigit() and int(step) < _FIRST_SPECIAL_STEP and "SLURM_PROCID" in environment


def num_tasks(environment: Mapping[str, str]) -> int:
    """Returns the number of tasks in this process's step of srun; 0 if it is not a task."""
    tasks = environment.get("SLURM_STEP_NUM_TASKS", "")
    return int(tasks) if is_task(environment) and tasks.isdigit() else 0


def tasks_beside(environment: Mapping[str, str]) -> int:
    """Returns the job's number of tasks if its batch script, not srun, has started this process; 0 if that is one."""
    tasks = environment.get("SLURM_NTASKS", "")
    in_script = environment.get("ENVIRONMENT") == "BATCH" and not is_task(environment)
    return int(tasks) if in_script and tasks.isdigit() and int(tasks) > 1 else 0


def rank_so_far(environment: Mapping[str, str]) -> int:
    """Returns this process's rank by the variables of its launcher or srun, before it joins the others; else 0."""
    return int(environment.get("RANK") or environment.get("SLURM_PROCID") or 0)


def rank_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Returns the variables that torchrun would set: RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_*.

    MASTER_ADDR and MASTER_PORT are kept if set already. Raises UserError when WORLD_SIZE is set and differs.
    """
    try:
        return _rank_variables(environment)
    except KeyError as error:  # a container that was not given all of them
        raise UserError(f"a task of srun, but {error.args[0]} is not set; hand all SLURM_* variables on") from None
    except UserError:
        raise
    except (ValueError, IndexError):
        raise UserError("SLURM's variables contradict each other; set RANK, WORLD_SIZE, LOCAL_RANK yourself") from None


def _rank_variables(environment: Mapping[str, str]) -> dict[str, str]:
    world = environment.get("SLURM_STEP_NUM_TASKS") or environment["SLURM_NTASKS"]
    if (given := environment.get("WORLD_SIZE", world)) != world:
        raise UserError(
            f"WORLD_SIZE is {given}, but srun has started {world} tasks; leave it to SLURM, or ask for {given}"
        )
    nodes = environment.get("SLURM_STEP_NODELIST") or environment["SLURM_JOB_NODELIST"]
    alone = environment.get("SLURM_STEP_NUM_NODES") == "1"
    job, step = int(environment["SLURM_JOB_ID"]), int(environment["SLURM_STEP_ID"])
    found = {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": world,
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(_tasks_here(environment)),
        "MASTER_ADDR": "127.0.0.1" if alone else first_host(nodes),
        # From the job, its step and its restarts: other jobs may share the node. Below Linux's ephemeral ports.
        "MASTER_PORT": str(20000 + (8 * job + step + 101 * int(environment.get("SLURM_RESTART_COUNT", 0))) % 12000),
    }
    return found | {name: environment[name] for name in ("MASTER_ADDR", "MASTER_PORT") if name in environment}


def first_host(nodes: str) -> str:
    """Returns the first name of a list as SLURM writes it: `gpu[003-017,020],login` begins with gpu003."""
    entry = re.split(r",(?![^\[]*\])", nodes)[0]
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", entry)


def _tasks_here(environment: Mapping[str, str]) -> int:
    """Returns the number of tasks on this node, from a list such as `8(x3),4`: nodes in order, repetitions in ()."""
    counts: list[int] = []
    for entry in environment["SLURM_STEP_TASKS_PER_NODE"].split(","):
        count, _, times = entry.rstrip(")").partition("(x")
        counts += [int(count)] * int(times or 1)
    return counts[int(environment["SLURM_NODEID"])]
