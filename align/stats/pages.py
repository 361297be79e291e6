"""HTML pages: their templates, which share `page_base.css` and escape all values."""

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

from sail_align.align.stats.tables import one_line


def page_environment(package: str) -> Environment:
    """Return the environment of a package's templates. Values are escaped, and texts put on one line."""
    return Environment(
        loader=ChoiceLoader([PackageLoader(package, "."), PackageLoader("sail_align.align.stats", ".")]),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=lambda value: one_line(value) if type(value) is str else value,
        trim_blocks=True,
        lstrip_blocks=True,
    )
