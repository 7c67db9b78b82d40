"""Run the command line: `python -m nanonormuon` is `normuon-train`."""

from nanonormuon.cli.app import entry

if __name__ == "__main__":
    entry()
