-- $1 key, $2 question. Notifications cost every commit of the server: only who is waited for sends one. A row that a transaction
-- has locked is left alone, for who waits polls as well.
WITH watched AS (
    UPDATE {table} r SET watched = true
    WHERE r.key IN (
        SELECT s.key FROM {table} s
        WHERE s.key = $1 AND s.version = 1 AND s.state = 0 AND NOT s.watched
        FOR UPDATE SKIP LOCKED
    )
)
SELECT {tag} AS statement, $2::bigint AS question
