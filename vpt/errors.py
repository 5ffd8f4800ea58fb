"""Errors that a user can mend. Each message says what is wrong, where, and what to do or type next."""


class UserError(Exception):
    """Something about the input; shown without a traceback by the command-line programs."""


class ConfigError(UserError):
    """A configuration that cannot run."""


class DataError(UserError):
    """A record, image or folder that cannot be used."""


class CheckpointError(UserError):
    """A folder that is no checkpoint, or a checkpoint of another configuration."""
