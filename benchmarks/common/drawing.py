""" Common parts of the plots """
from matplotlib.axis import Axis
from matplotlib.ticker import LogLocator


def set_log_ticks(axis: Axis) -> None:
    """Set plain numbers as ticks of a logarithmic axis, with enough ticks for a range of less than a decade."""
    axis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 7)))
    axis.set_major_formatter('{x:g}')
    axis.set_minor_formatter('')
