-- $1 positions, $2 their failures at the time of the take, $3 lock timeout, $4 question.
WITH changed AS (
    UPDATE {table} SET failures = failures - 1, suspect = false, publish_at = statement_timestamp()
    WHERE position = ANY ($1) AND (position, failures) IN (SELECT * FROM unnest($1::bigint[], $2::integer[]))
      AND {bounded $3}
    RETURNING position
)
SELECT count(*) AS changed, {tag} AS statement, $4::bigint AS question FROM changed
