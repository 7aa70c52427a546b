"""Tables of data sets on the Hub, by its parquet export: downloaded once, checked, their rows in a seeded order."""

from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from onechip.download import download_file, is_commit, look_up_files, newest_revision
from onechip.errors import UserError, first_line, require, say
from onechip.files import clear_abandoned, read_json_or_none, write_json
from onechip.hubclient import load_hub, try_again, without_bars
from onechip.machine import home

EXPORT = "refs/convert/parquet"  # the branch of every data set on which the Hub keeps its tables as parquet
SEED = 42
LISTING = "files.json"  # written last: with it, all files of a table are here


class Table(NamedTuple):
    """A split of a data set on the Hub. revision: a commit of its parquet export; empty for the newest one when this
    machine first asks for it, which then stays."""

    repo: str
    subset: str
    split: str
    columns: tuple
    revision: str = ""


def open_parquet(path, columns):
    """A pyarrow.Table of these columns of a file; UserError if it is no parquet or lacks one."""
    try:
        with pq.ParquetFile(path) as file:
            absent = [name for name in columns if name not in file.schema_arrow.names]
            require(not absent, f"{path}: column", absent[:1], f"has only {', '.join(file.schema_arrow.names)}")
            return file.read(columns=list(columns))
    except (pa.ArrowException, OSError) as error:
        raise UserError(
            f"{path}: not a complete parquet file ({first_line(error)}); delete it and get it again"
        ) from None


def table_files(table, revision):
    """The paths of a table's parquet files, in order, downloaded to the home folder unless they are there."""
    place = "/".join((table.subset, table.split))
    folder = home() / "tables" / f"{table.repo.replace('/', '--')}-{revision[:12]}" / place
    known = (read_json_or_none(folder / LISTING) or {}).get("files")
    if not known or not all((folder / name).exists() for name in known):
        known = download_table(table, revision, folder, place)
        write_json(folder / LISTING, {"repo": table.repo, "revision": revision, "files": known})
    return [folder / name for name in known]


def download_table(table, revision, folder, place):
    """Downloads the files in `place` of the export that are not here; returns their names."""
    api = load_hub().HfApi(token=False)  # public data
    options = {"path_in_repo": place, "revision": revision, "repo_type": "dataset"}
    listing = lambda: [entry.path for entry in api.list_repo_tree(table.repo, **options)]
    paths = sorted(path for path in try_again(listing, f"{table.repo}: cannot be listed") if path.endswith(".parquet"))
    require(paths, "table", f"{table.repo} {place}", f"the Hub has no parquet files of it at {revision[:12]}")
    listed = look_up_files(table.repo, paths, revision)
    clear_abandoned(folder)
    missing = [path for path in paths if not (folder / path.rpartition("/")[2]).exists()]
    if missing:
        size = sum(listed[path].size for path in missing)
        say(f"download: {place} of {table.repo} at {revision[:12]}, {size / 1e6:,.1f} MB, to {folder}")
    with without_bars():
        for path in missing:
            check = lambda part: open_parquet(part, table.columns) and None
            download_file(folder / path.rpartition("/")[2], listed[path], table.repo, revision, check)
    return [path.rpartition("/")[2] for path in paths]


def find_revision(table):
    """The commit of a table's export: its own, or the newest when this machine first asked."""
    note = f"{table.repo.replace('/', '--')}-parquet"
    revision = table.revision or newest_revision(note, table.repo, EXPORT)
    require(is_commit(revision), "revision", revision, f"must be a commit of {table.repo}, 40 hexadecimal digits")
    return revision


class TableRows(NamedTuple):
    """The rows of a table in a seeded order, each made a dict when it is asked for. revision: the commit of its export.

    The order is NumPy's permutation of that seed, which is that of `datasets.Dataset.shuffle(seed)`.
    """

    whole: pa.Table
    order: np.ndarray
    revision: str

    @property
    def size(self):
        return len(self.whole)

    def row(self, i):
        """Row i as a dict, the first one again after the last."""
        return self.whole.slice(int(self.order[i % len(self.order)]), 1).to_pylist()[0]


def open_rows(table, seed=SEED):
    """The TableRows of a Table; UserError if it cannot be had, or is empty."""
    revision = find_revision(table)
    whole = pa.concat_tables(open_parquet(path, table.columns) for path in table_files(table, revision))
    require(len(whole), "table", table.repo, f"has no rows in {table.subset}/{table.split}")
    return TableRows(whole, np.random.default_rng(seed).permutation(len(whole)), revision)


def load_rows(table, limit=0, seed=SEED):
    """(rows as dicts, how many the table has, its commit): the first `limit` of open_rows, all if that is 0."""
    rows = open_rows(table, seed)
    chosen = rows.whole.take(pa.array(rows.order[:limit] if limit else rows.order))
    return chosen.to_pylist(), rows.size, rows.revision
