-- $1 key, $2 nonce, $3 fence, $4 state (1 unknown, 2 tombstone, 3 stored response), $5 head, $6
-- body, $7 retention in microseconds, $8 lock timeout or NULL, $9 question.
--
-- Completes a record like finish.sql. Always returns one row, which shows the record as it was
-- before.
WITH completed AS (
    -- Only the owner completes a record (I8), and only once (I2).
    UPDATE {table} r
    SET state = $4, head = $5, body = $6, expires = {now} + $7
    WHERE r.key = $1 AND r.version = 1 AND r.nonce = $2 AND r.fence = $3 AND r.state IN (0, 1) AND NOT {expired_now}
      AND {set_lock_timeout $8}
    RETURNING r.key, r.watched
), repeated AS (
    -- The owner repeats its completion. The write changes nothing, but its commit waits for a
    -- synchronous standby. If the server restarted during the wait of the first commit, this
    -- session sees a completed record that the standby may lack.
    UPDATE {table} r
    SET expires = r.expires
    WHERE r.key = $1 AND r.version = 1 AND r.nonce = $2 AND r.fence = $3 AND r.state NOT IN (0, 1) AND NOT {expired_now}
      AND {set_lock_timeout $8}
)
SELECT EXISTS (SELECT FROM completed) AS changed, {columns},
    (SELECT {notify} FROM completed r WHERE r.watched) AS notified,
    {tag} AS statement, $9::bigint AS question
FROM (SELECT) one LEFT JOIN (SELECT s.*, {now} AS now FROM {table} s WHERE s.key = $1) r ON true
