-- $1 positions, $2 their failures at the time of the take, $3 first pause, $4 longest pause, both in seconds, $5 lock
-- timeout, $6 question.
WITH changed AS (
    UPDATE {table} SET
        suspect = false,
        publish_at = statement_timestamp()
            + make_interval(secs => least($4::float8, $3::float8 * 2::float8 ^ least(failures - 1, 20)))
    WHERE position = ANY ($1) AND (position, failures) IN (SELECT * FROM unnest($1::bigint[], $2::integer[]))
      AND {bounded $5}
    RETURNING position
)
SELECT count(*) AS changed, {tag} AS statement, $6::bigint AS question FROM changed
