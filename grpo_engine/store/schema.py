"""The tables of ``runs.db`` and how an older file becomes a current one.

Structure changes by numbered migrations, each applied once and recorded by sqlite-utils. Metrics need none:
`upgrade` gives ``steps`` a column for every key of `STEP_METRICS` that it lacks, so a new metric is a line in
``recorder.py``; older steps read as missing there. A column this version does not know is left alone.

Floats are REAL (missing, NaN and infinite: NULL), times seconds since 1970, JSON is UTF-8 text, per-token
numbers are little-endian float32 or int32 blobs, file paths are relative to the database's folder with ``/``.
Latent seeds are text: they may need 64 bits without a sign, which SQLite's integers don't have.
"""

from __future__ import annotations

from sqlite_utils import Database, Migrations

from ..recorder import STEP_METRICS

APPLICATION_ID = 0x4752504F  # "GRPO", in the file's header: tells our files from other programs' databases

BLOCK = 64
"""Steps summed up by one row of ``step_blocks``; a power of two, so that wider bins are whole blocks."""


def m001_runs(db: Database) -> None:
    """Everything the first version knew."""
    db.executescript(_FIRST)


def m002_shift(db: Database) -> None:
    """How far training had moved each token's log-probability; older rollouts have none."""
    db.execute("ALTER TABLE rollouts ADD COLUMN shift BLOB")


def m003_choices(db: Database) -> None:
    """What a person preferred, blind; and a quick way to the steps that trained on a prompt."""
    db.executescript(_CHOICES)


def m004_cut(db: Database) -> None:
    """How much of a measured text the image model did not read; not known of older measurements."""
    db.execute("ALTER TABLE evaluation_items ADD COLUMN cut_tokens INTEGER")
    db.execute("ALTER TABLE evaluation_items ADD COLUMN read_chars INTEGER")


MIGRATIONS = (m001_runs, m002_shift, m003_choices, m004_cut)  # in this order; never change one that was released

migrations = Migrations("grpo_engine")
for _migration in MIGRATIONS:
    migrations()(_migration)


def upgrade(db: Database) -> None:
    """Bring a database, new or older, to the current schema. The caller holds the write transaction."""
    migrations.apply(db)
    present = db.table("steps").columns_dict
    for name in STEP_METRICS:
        if name not in present:
            db.table("steps").add_column(name, float)
    if application_id(db) != APPLICATION_ID:
        db.execute(f"PRAGMA application_id = {APPLICATION_ID}")


def application_id(db: Database) -> int:
    """The mark of the program that the file belongs to; 0 = none."""
    (mark,) = db.execute("PRAGMA application_id").fetchone()
    return int(mark)


def unknown_migrations(db: Database) -> list[str]:
    """Migrations that were applied to the file but are not known here: it is of a newer version."""
    known = {migration.__name__ for migration in MIGRATIONS}
    return [migration.name for migration in migrations.applied(db) if migration.name not in known]


# steps: read by ranges of one run, so its rows are kept in that order.
# step_blocks: count, smallest, largest and sum of one metric over BLOCK steps, for charts of long runs.
# Block b covers steps b*BLOCK+1 .. (b+1)*BLOCK and is written in the transaction of its last step.
# clock: one number that moves with every visible change, so that a watcher asks for nothing else.
_FIRST = """
CREATE TABLE runs (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    name TEXT NOT NULL,
    state TEXT NOT NULL,
    preset TEXT NOT NULL,
    config TEXT NOT NULL,
    seed INTEGER NOT NULL,
    prompt_set TEXT NOT NULL,
    prompt_fingerprint TEXT NOT NULL,
    tags TEXT NOT NULL,
    notes TEXT NOT NULL,
    source TEXT NOT NULL CHECK (source IN ('local', 'imported')),
    created REAL NOT NULL,
    started REAL,
    finished REAL,
    updated REAL NOT NULL,
    heartbeat REAL,
    pid INTEGER,
    host TEXT,
    process_token TEXT,
    step INTEGER NOT NULL DEFAULT 0,
    total_steps INTEGER NOT NULL,
    phase TEXT NOT NULL DEFAULT '',
    phase_done INTEGER NOT NULL DEFAULT 0,
    phase_total INTEGER NOT NULL DEFAULT 0,
    message TEXT NOT NULL DEFAULT '',
    error TEXT,
    resumed_count INTEGER NOT NULL DEFAULT 0,
    summary TEXT
);

CREATE TABLE steps (
    run_id TEXT NOT NULL REFERENCES runs(id) ON DELETE CASCADE,
    step INTEGER NOT NULL CHECK (step >= 1),
    time REAL NOT NULL,
    PRIMARY KEY (run_id, step)
) WITHOUT ROWID;

CREATE TABLE step_blocks (
    run_id TEXT NOT NULL REFERENCES runs(id) ON DELETE CASCADE,
    metric TEXT NOT NULL,
    block INTEGER NOT NULL,
    count INTEGER NOT NULL,
    low REAL NOT NULL,
    high REAL NOT NULL,
    total REAL NOT NULL,
    PRIMARY KEY (run_id, metric, block)
) WITHOUT ROWID;

CREATE TABLE rollouts (
    id INTEGER PRIMARY KEY,
    run_id TEXT NOT NULL,
    step INTEGER NOT NULL,
    g INTEGER NOT NULL,
    k INTEGER NOT NULL,
    prompt_id TEXT NOT NULL,
    prompt TEXT NOT NULL,
    tier TEXT NOT NULL,
    completion TEXT NOT NULL,
    rewrite TEXT,
    finished INTEGER NOT NULL,
    reward REAL,
    advantage REAL,
    kl REAL,
    parts TEXT NOT NULL,
    latent_seed TEXT NOT NULL,
    token_ids BLOB,
    tokens TEXT,
    logprobs BLOB,
    entropies BLOB,
    token_kl BLOB,
    image TEXT,
    thumbnail TEXT,
    UNIQUE (run_id, step, g, k),
    FOREIGN KEY (run_id, step) REFERENCES steps(run_id, step) ON DELETE CASCADE
);

CREATE TABLE evaluations (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    run_id TEXT NOT NULL REFERENCES runs(id) ON DELETE CASCADE,
    kind TEXT NOT NULL,
    step INTEGER NOT NULL,
    split TEXT NOT NULL,
    time REAL NOT NULL,
    items INTEGER NOT NULL,
    summary TEXT NOT NULL,
    UNIQUE (run_id, kind, step)
);

CREATE TABLE evaluation_items (
    evaluation_id INTEGER NOT NULL REFERENCES evaluations(id) ON DELETE CASCADE,
    arm TEXT NOT NULL,
    prompt_id TEXT NOT NULL,
    "index" INTEGER NOT NULL,
    prompt TEXT NOT NULL,
    tier TEXT NOT NULL,
    latent_seed TEXT NOT NULL,
    rewrite TEXT,
    reward REAL,
    parts TEXT NOT NULL,
    judge REAL,
    judge_parts TEXT NOT NULL,
    image TEXT,
    thumbnail TEXT,
    PRIMARY KEY (evaluation_id, prompt_id, arm, "index")
) WITHOUT ROWID;

CREATE TABLE events (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    run_id TEXT NOT NULL REFERENCES runs(id) ON DELETE CASCADE,
    time REAL NOT NULL,
    kind TEXT NOT NULL,
    level TEXT NOT NULL,
    message TEXT NOT NULL,
    data TEXT NOT NULL
);
CREATE INDEX events_run ON events (run_id, id);

CREATE TABLE commands (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    run_id TEXT NOT NULL REFERENCES runs(id) ON DELETE CASCADE,
    command TEXT NOT NULL,
    created REAL NOT NULL,
    taken REAL,
    outcome TEXT
);
CREATE INDEX commands_waiting ON commands (run_id, taken);

CREATE TABLE clock (id INTEGER PRIMARY KEY CHECK (id = 1), revision INTEGER NOT NULL);
INSERT INTO clock (id, revision) VALUES (1, 0);
"""

# choices: between two arms' pictures of a prompt, on the same latents; see choices.py.
# rollouts_prompt: one entry a group, not a rollout, to find a prompt's groups among millions of rollouts.
_CHOICES = """
CREATE TABLE choices (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    run_id TEXT NOT NULL REFERENCES runs(id) ON DELETE CASCADE,
    evaluation_id INTEGER NOT NULL REFERENCES evaluations(id) ON DELETE CASCADE,
    prompt_id TEXT NOT NULL,
    "index" INTEGER NOT NULL,
    left_arm TEXT NOT NULL,
    right_arm TEXT NOT NULL,
    choice TEXT NOT NULL CHECK (choice IN ('left', 'right', 'neither')),
    clip_prefers TEXT NOT NULL CHECK (clip_prefers IN ('left', 'right', 'neither')),
    time REAL NOT NULL
);
CREATE INDEX choices_evaluation ON choices (evaluation_id, prompt_id);
CREATE INDEX choices_run ON choices (run_id);
CREATE INDEX rollouts_prompt ON rollouts (run_id, prompt_id, step) WHERE k = 0;
"""
