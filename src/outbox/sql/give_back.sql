-- $1 positions, $2 the failures of each message when it was taken, $3 lock timeout or NULL, $4
-- question.
--
-- Undoes the take of messages that were not tried. A message that another relay has taken meanwhile
-- has more failures, and is left alone, unless its count has reached the highest number. Returns
-- one row.
WITH changed AS (
    UPDATE {table} SET failures = failures - 1, taken_at = NULL, publish_at = statement_timestamp()
    WHERE position = ANY ($1) AND (position, failures) IN (SELECT * FROM unnest($1::bigint[], $2::integer[]))
      AND {set_lock_timeout $3}
    RETURNING position
)
SELECT count(*) AS changed, {tag} AS statement, $4::bigint AS question FROM changed
