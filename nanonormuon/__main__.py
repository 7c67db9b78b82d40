"""`python -m nanonormuon`: what `normuon-train` runs."""

from nanonormuon.cli.app import entry

if __name__ == "__main__":
    entry()
