"""Errors whose message is written for the user. Everything else that is raised is a defect of ours.

`exit_code` is what a command line exits with (see README, "Exit codes"). A message says where, what is wrong (the
value), what is expected, and the way out, in one line, whatever the names of files, keys and tensors in it hold.
"""

import errno

from pretrain.escape import shown

# Errors of a network disk that is away, or hiccups: the same call may succeed in a while.
PASSING_ERRORS = {
    errno.EIO,
    errno.ESTALE,
    errno.ETIMEDOUT,
    errno.EAGAIN,
    errno.EREMOTEIO,
    errno.ENOTCONN,
    errno.ECONNRESET,
    errno.ESHUTDOWN,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
}

# Waits before a read is tried again after one. A Lustre client that a server has evicted gives EIO for seconds.
RETRY_AFTER_S = (0.5, 2.0, 8.0, 20.0)


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message, or the name of its type if the message is empty."""
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__


class UserError(ValueError):
    """The user's input cannot be used: configuration, data set, weights, launch. Retrying cannot help."""

    exit_code = 2

    def __str__(self) -> str:
        return shown(super().__str__())


class ConfigError(UserError):
    """A key or a value of the configuration is wrong; one argument for each problem."""

    def __str__(self) -> str:
        return shown("; ".join(str(problem) for problem in self.args))


class NotFoundError(UserError):
    """A file that the user names is not there; it may be on a disk that is away."""


class TakenOverError(UserError):
    """Another start has taken the run's folder over: this one must not write in it any more."""


class StorageError(OSError):
    """Reading or writing failed for now: the same command may succeed later."""

    exit_code = 75

    def __str__(self) -> str:
        return shown(super().__str__())


class DeviceMemoryError(Exception):
    """The device's memory is too small, perhaps on this rank alone: no collective may follow."""

    exit_code = 2


class LostProcessError(RuntimeError):
    """A rank or a loader worker died or hangs: the same command goes on from the newest checkpoint."""

    exit_code = 76


class NonFiniteError(ArithmeticError):
    """Loss or gradients were not finite for too many steps in a row."""

    exit_code = 77


class BadSamplesError(UserError):
    """More samples than allowed could not be read or decoded."""

    exit_code = 78
