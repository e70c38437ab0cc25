-- The messages of an `Outbox`, one row per message that was not published yet.
CREATE TABLE IF NOT EXISTS {table} (
    position   bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    id         text        NOT NULL UNIQUE,
    topic      text        NOT NULL,
    names      text[]      NOT NULL,                             -- of the headers
    contents   text[]      NOT NULL,                             -- of the headers, in the same order
    payload    bytea       NOT NULL,
    failures   integer     NOT NULL DEFAULT 0,                   -- attempts to publish it, including the current one
    taken_at   timestamptz,                                      -- NULL unless a relay has it, or died with it
    put_at     timestamptz NOT NULL DEFAULT clock_timestamp(),
    publish_at timestamptz NOT NULL DEFAULT clock_timestamp(),   -- the time before which it is not due
    CONSTRAINT {name}_headers
        CHECK (cardinality(names) = cardinality(contents) AND array_position(names || contents, NULL) IS NULL)
);
CREATE INDEX IF NOT EXISTS {name}_publish_at ON {table} (publish_at, position);
