-- The records of `PostgresStore`, one row per storage key. Times are in microseconds since the Unix
-- epoch by `clock_timestamp()` of this server. Durations are in microseconds. `{table}` is the name
-- of the table, and `{name}` is the same name without its schema.
CREATE TABLE IF NOT EXISTS {table} (
    key         bytea    PRIMARY KEY CHECK (octet_length(key) = 32),
    version     smallint NOT NULL,                                        -- of this layout, 1
    state       smallint NOT NULL CHECK (version <> 1 OR state BETWEEN 0 AND 3), -- in flight, unknown, tombstone, stored response
    kind        smallint NOT NULL,                                        -- of the grant: 0 execute, 1 recover
    fingerprint bytea    NOT NULL,                                        -- 1 byte of algorithm, 32 of digest
    nonce       bytea    NOT NULL,                                        -- of the owner, 16 bytes
    fence       bigint   NOT NULL,                                        -- of the owner
    attempt     integer  NOT NULL,
    lease       bigint   NOT NULL,
    retention   bigint   NOT NULL,
    lease_until bigint   NOT NULL,                                        -- has a meaning only in flight
    expires     bigint   NOT NULL,                                        -- from then on the row counts as absent
    watched     boolean  NOT NULL DEFAULT false,                          -- a waiter listens for the end of the attempt
    head        bytea,                                                    -- of the stored response
    body        bytea
);
CREATE INDEX IF NOT EXISTS {name}_expires ON {table} (expires);
