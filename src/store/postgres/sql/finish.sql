-- $1 key, $2 nonce, $3 fence, $4 state (1 unknown by a rejection, 2 tombstone, 3 stored response),
-- $5 head, $6 body, $7 retention in microseconds, $8 lock timeout or NULL, $9 question.
--
-- Decides most completions. If it returns no row, it has changed nothing, and complete.sql shows
-- why. Only the owner completes a record (I8), and only once (I2).
UPDATE {table} r
SET state = $4, head = $5, body = $6, expires = {now} + $7
WHERE r.key = $1 AND r.version = 1 AND r.nonce = $2 AND r.fence = $3 AND r.state IN (0, 1) AND NOT {expired_now}
  AND {set_lock_timeout $8}
RETURNING true AS changed, NULL::smallint AS version, CASE WHEN r.watched THEN {notify} END AS notified,
    {tag} AS statement, $9::bigint AS question
