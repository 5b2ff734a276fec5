"""The style table: `get_style`, `style_names`, `styles`, and `register_style` for rows of your own."""

from parallel_plans.styles import expert_table as expert_table
from parallel_plans.styles import sequence_table as sequence_table
from parallel_plans.styles import table as table  # importing the three registers their rows
from parallel_plans.styles.base import Style, get_style, register_style, style_names, styles

__all__ = ["Style", "get_style", "register_style", "style_names", "styles"]
