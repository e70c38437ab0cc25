-- $1 key, $2 nonce, $3 fence, $4 lock timeout or NULL, $5 question.
--
-- Only the owner changes a claim (I8).
WITH deleted AS (
    -- Delete only if this was the only attempt ever. Otherwise the record is evidence of an earlier
    -- one (I6).
    DELETE FROM {table} r
    WHERE r.key = $1 AND r.version = 1 AND r.nonce = $2 AND r.fence = $3 AND r.state IN (0, 1) AND r.attempt = 1
      AND NOT {expired_now} AND {set_lock_timeout $4}
    RETURNING r.key, r.watched
), ended AS (
    -- After a later attempt, end the lease now, and keep the record for its retention.
    UPDATE {table} r
    SET lease = 0, lease_until = {now}, expires = {now} + r.retention
    WHERE r.key = $1 AND r.version = 1 AND r.nonce = $2 AND r.fence = $3 AND r.state = 0 AND r.attempt > 1
      AND NOT {expired_now} AND {set_lock_timeout $4}
    RETURNING r.key, r.watched
), changed AS (
    SELECT * FROM deleted UNION ALL SELECT * FROM ended
)
SELECT EXISTS (SELECT FROM changed) AS changed, {columns},
    (SELECT {notify} FROM changed r WHERE r.watched) AS notified,
    {tag} AS statement, $5::bigint AS question
FROM (SELECT) one LEFT JOIN (SELECT s.*, {now} AS now FROM {table} s WHERE s.key = $1) r ON true
