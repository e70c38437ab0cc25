-- $1 key, $2 fence, $3 state (-1 absent, 1 unknown, 2 tombstone, 3 stored response), $4 head, $5
-- body, $6 retention in microseconds, $7 lock timeout or NULL, $8 question.
--
-- A resolution applies only to the attempt with this fence, and only if that attempt is lost or
-- unknown.
WITH deleted AS (
    DELETE FROM {table} r
    WHERE $3 = -1 AND r.key = $1 AND r.version = 1 AND r.fence = $2 AND {lost_now} AND NOT {expired_now} AND {set_lock_timeout $7}
    RETURNING r.key, r.watched
), completed AS (
    -- The owner may still be alive. Another nonce in the record ends its ownership. Otherwise its
    -- completion would count as a repeated one, and its caller would get another response than all
    -- others (I2). A rejection stores no outcome, so it leaves the owner in place. Only a
    -- completion inverts the nonce, because a second inversion would restore the former owner.
    UPDATE {table} r
    SET state = $3, head = $4, body = $5, expires = {now} + $6,
        nonce = CASE $3 WHEN 1 THEN r.nonce ELSE set_byte(r.nonce, 0, 255 - get_byte(r.nonce, 0)) END
    WHERE $3 <> -1 AND r.key = $1 AND r.version = 1 AND r.fence = $2 AND {lost_now} AND NOT {expired_now} AND {set_lock_timeout $7}
    RETURNING r.key, r.watched
), changed AS (
    SELECT * FROM deleted UNION ALL SELECT * FROM completed
)
SELECT EXISTS (SELECT FROM changed) AS changed, {columns},
    (SELECT {notify} FROM changed r WHERE r.watched) AS notified,
    {tag} AS statement, $8::bigint AS question
FROM (SELECT) one LEFT JOIN (SELECT s.*, {now} AS now FROM {table} s WHERE s.key = $1) r ON true
