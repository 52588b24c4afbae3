"""Search in SQLite with sqlite-vec: bits by Hamming distance, then int8 codes by the float query.

sqlite-vec compares int8 with int8, all dims on one scale, where m2dexport's int8 codes have a range
for each dim, and a float query would lose its digits. So SQLite compares the bits and only keeps
the int8 codes, as they are; those of the candidates are decoded and ranked here. To compare int8
codes in SQL, build with ``--vectors int8-symmetric``.

apsw is SQLite for Python with extensions, which the sqlite3 of many Pythons cannot load.

    pip install m2dexport sqlite-vec apsw
    python sqlite_vec_index.py int8.m2d int8.npy bits.m2d bits.npy queries.txt
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import apsw
import numpy as np
import sqlite_vec
from space import CANDIDATES, TOP, Collection, bits_in_bytes, collection, report, two_steps

CANDIDATES_OF = "SELECT rowid, codes FROM documents WHERE bits MATCH vec_bit(?) AND k = ?"


def connect(path: Path) -> apsw.Connection:
    """Return a database with sqlite-vec."""
    connection = apsw.Connection(str(path))
    connection.enable_load_extension(True)
    connection.load_extension(sqlite_vec.loadable_path())
    connection.enable_load_extension(False)
    return connection


def fill(connection: apsw.Connection, documents: Collection) -> None:
    """Write bits and codes of every document, and their space."""
    width = bits_in_bytes(documents)  # zero bits at the end of a row change no distance
    connection.execute(
        f"CREATE VIRTUAL TABLE documents USING vec0(bits bit[{width}], +codes BLOB);"
        "CREATE TABLE space (space_id TEXT NOT NULL)"
    )
    connection.execute("INSERT INTO space VALUES (?)", (documents.space_id,))
    rows = zip(documents.bits, documents.codes, strict=True)
    with connection:
        connection.executemany(
            "INSERT INTO documents (rowid, bits, codes) VALUES (?, vec_bit(?), ?)",
            ((row, bits.tobytes(), codes.tobytes()) for row, (bits, codes) in enumerate(rows)),
        )


def require_space(connection: apsw.Connection, documents: Collection) -> None:
    """Refuse a database whose vectors are of another space than the queries."""
    (stored,) = connection.execute("SELECT space_id FROM space").fetchone()
    if stored != documents.space_id:
        raise SystemExit(
            f"Error: the database (space {stored}) and the queries (space {documents.space_id}) "
            "must not be compared; encode both with one bundle."
        )


def search(connection: apsw.Connection, documents: Collection) -> np.ndarray:
    """Return the best of the candidates that the bits find, by cosine with the float query."""
    best = np.empty((len(documents.queries), TOP), dtype=np.int64)
    for number, (query, bits) in enumerate(
        zip(documents.queries, documents.query_bits, strict=True)
    ):
        found = connection.execute(CANDIDATES_OF, (bits.tobytes(), CANDIDATES)).fetchall()
        rows = np.array([row for row, _ in found])
        codes = np.stack([np.frombuffer(blob, dtype=np.int8) for _, blob in found])
        ranked = documents.codec.search(query[None], codes, TOP).rows[0]
        best[number] = rows[ranked]
    return best


def main() -> None:
    """Fill a database, open it again, search, compare with numpy."""
    documents = collection(__doc__.splitlines()[0])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "documents.sqlite")
        fill(connect(path), documents)
        connection = connect(path)
        (version,) = connection.execute("SELECT vec_version()").fetchone()
        print(f"sqlite-vec {version}, {len(documents.codes)} documents")
        print(f"the database: {path.stat().st_size / len(documents.codes):.1f} bytes per vector")
        require_space(connection, documents)
        found = search(connection, documents)
        report(f"bits, {CANDIDATES} rescored by int8", found, documents, two_steps(documents))
        connection.close()


if __name__ == "__main__":
    main()
