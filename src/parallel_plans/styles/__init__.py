"""The style table: `get_style`, `style_names`, `styles`, and `register_style` for rows of your own."""

from parallel_plans.styles import table as table  # registers the rows
from parallel_plans.styles.base import Style, get_style, register_style, style_names, styles

__all__ = ["Style", "get_style", "register_style", "style_names", "styles"]
