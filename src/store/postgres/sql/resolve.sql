-- $1 key, $2 fence, $3 state: -1 absent, 1 unknown, 2 tombstone, 3 kept, $4 head, $5 body, $6 retention, $7 lock timeout or NULL,
-- $8 question. The owner may still be alive. With another nonce in the record, its own completion is no repeated one.
WITH deleted AS (
    DELETE FROM {table} r
    WHERE $3 = -1 AND r.key = $1 AND r.version = 1 AND r.fence = $2 AND {lost_now} AND NOT {expired_now} AND {bounded $7}
    RETURNING r.key, r.watched
), completed AS (
    UPDATE {table} r
    SET state = $3, head = $4, body = $5, expires = {now} + $6, nonce = set_byte(r.nonce, 0, 255 - get_byte(r.nonce, 0))
    WHERE $3 <> -1 AND r.key = $1 AND r.version = 1 AND r.fence = $2 AND {lost_now} AND NOT {expired_now} AND {bounded $7}
    RETURNING r.key, r.watched
), changed AS (
    SELECT * FROM deleted UNION ALL SELECT * FROM completed
)
SELECT EXISTS (SELECT FROM changed) AS changed, {columns},
    (SELECT {notify} FROM changed r WHERE r.watched) AS told,
    {tag} AS statement, $8::bigint AS question
FROM (SELECT) one LEFT JOIN (SELECT s.*, {now} AS now FROM {table} s WHERE s.key = $1) r ON true
