-- $1 positions, $2 the failures of each message when it was taken, $3 first pause, $4 longest
-- pause, both in seconds, $5 lock timeout or NULL, $6 question.
--
-- Postpones messages that could not be published. The pause doubles with each failure. A message
-- that another relay has taken meanwhile has more failures, and is left alone, unless its count has
-- reached the highest number. Returns one row.
WITH changed AS (
    UPDATE {table} SET
        taken_at = NULL,
        publish_at = statement_timestamp()
            + make_interval(secs => least($4::float8, $3::float8 * 2::float8 ^ greatest(least(failures - 1, 20), 0)))
    WHERE position = ANY ($1) AND (position, failures) IN (SELECT * FROM unnest($1::bigint[], $2::integer[]))
      AND {set_lock_timeout $5}
    RETURNING position
)
SELECT count(*) AS changed, {tag} AS statement, $6::bigint AS question FROM changed
