-- $1 the largest number of rows, $2 question.
--
-- Deletes expired rows. Skips rows that another transaction has locked; the next sweep deletes
-- them.
WITH swept AS (
    DELETE FROM {table} WHERE key IN (
        SELECT r.key FROM {table} r
        WHERE r.version = 1 AND r.expires <= {now} AND {expired_now}
        ORDER BY r.expires
        LIMIT $1
        FOR UPDATE SKIP LOCKED
    )
    RETURNING key
)
SELECT count(*) AS swept, {tag} AS statement, $2::bigint AS question FROM swept
