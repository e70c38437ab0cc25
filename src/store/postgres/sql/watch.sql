-- $1 key, $2 question.
--
-- Marks the record, so that its change sends a notification. A notification slows every commit of
-- the server, so only a record with a waiter sends one. Skips a row that a transaction has locked,
-- because waiters poll as well.
WITH watched AS (
    UPDATE {table} r SET watched = true
    WHERE r.key IN (
        SELECT s.key FROM {table} s
        WHERE s.key = $1 AND s.version = 1 AND s.state = 0 AND NOT s.watched
        FOR UPDATE SKIP LOCKED
    )
)
SELECT {tag} AS statement, $2::bigint AS question
