-- $1 key, $2 nonce, $3 fence, $4 lease in microseconds, $5 lock timeout or NULL, $6 question.
--
-- A lease of zero gives the key up, which notifies waiters. Only the owner changes a claim (I8).
WITH renewed AS (
    UPDATE {table} r
    SET lease = $4, lease_until = {now} + $4, expires = {now} + $4 + r.retention
    WHERE r.key = $1 AND r.version = 1 AND r.nonce = $2 AND r.fence = $3 AND r.state = 0 AND NOT {expired_now}
      AND {set_lock_timeout $5}
    RETURNING r.key, r.watched
)
SELECT EXISTS (SELECT FROM renewed) AS changed, {columns},
    (SELECT {notify} FROM renewed r WHERE r.watched AND $4 = 0) AS notified,
    {tag} AS statement, $6::bigint AS question
FROM (SELECT) one LEFT JOIN (SELECT s.*, {now} AS now FROM {table} s WHERE s.key = $1) r ON true
