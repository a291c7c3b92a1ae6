"""Errors meant for a person rather than a debugger."""

from __future__ import annotations


class UserError(ValueError):
    """Something the user gave cannot be used: one sentence that says what, where and what to do.

    The command line prints the sentence without a traceback and exits with code 2.
    """
