-- The records of `PostgresStore`, one row per storage key. Times are microseconds since the Unix epoch, durations microseconds,
-- both by `clock_timestamp()` of this server. `{table}` is the table's name, `{name}` the same without its schema.
CREATE TABLE IF NOT EXISTS {table} (
    key         bytea    PRIMARY KEY CHECK (octet_length(key) = 32),
    version     smallint NOT NULL,                                        -- of this layout: 1
    state       smallint NOT NULL CHECK (version <> 1 OR state BETWEEN 0 AND 3), -- in flight, unknown, tombstone, kept
    kind        smallint NOT NULL,                                        -- of the grant: 0 execute, 1 recover
    fingerprint bytea    NOT NULL,                                        -- 1 byte of algorithm, 32 of digest
    nonce       bytea    NOT NULL,                                        -- of the owner, 16 bytes
    fence       bigint   NOT NULL,                                        -- of the owner
    attempt     integer  NOT NULL,
    lease       bigint   NOT NULL,
    retention   bigint   NOT NULL,
    lease_until bigint   NOT NULL,                                        -- counts only in flight
    expires     bigint   NOT NULL,                                        -- the row counts as absent from then on
    watched     boolean  NOT NULL DEFAULT false,                          -- somebody listens for its end
    head        bytea,                                                    -- of the kept answer
    body        bytea
);
CREATE INDEX IF NOT EXISTS {name}_expires ON {table} (expires);
