"""sail-extract: encode a data set once with frozen encoders and keep the features in a store."""

from sail_align.extract.cli.data import check, download, init
from sail_align.extract.cli.encoders import encoders
from sail_align.extract.cli.exchange import export_features, import_features
from sail_align.extract.cli.run import run
from sail_align.extract.cli.stores import doctor, overlap, status, upgrade, verify
from sail_align.extract.system.command_line import GroupedCommand, make_app, run_command

app = make_app(__doc__)
for command in (run, init, check, download, encoders, status, verify, upgrade, doctor, overlap):
    app.command(command.__name__, cls=GroupedCommand)(command)
app.command("import", cls=GroupedCommand)(import_features)
app.command("export", cls=GroupedCommand)(export_features)


def main() -> None:
    """Run the command line."""
    run_command(app)
