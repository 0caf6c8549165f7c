""" Short text for errors of other libraries """
import textwrap
import traceback


def reason(error: Exception, width: int = 600) -> str:
    """Type and text of an error on one line of limited width; for an assertion without a text, its source line."""
    text = textwrap.shorten(str(error), width, placeholder=' ...')
    if not text and isinstance(error, AssertionError):
        text = traceback.extract_tb(error.__traceback__)[-1].line or ''
    return f'{type(error).__name__}: {text}' if text else type(error).__name__
