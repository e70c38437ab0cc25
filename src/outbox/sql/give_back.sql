-- $1 positions, $2 the failures when they were taken.
UPDATE {table} SET failures = failures - 1, suspect = false, publish_at = statement_timestamp()
WHERE position = ANY ($1) AND (position, failures) IN (SELECT * FROM unnest($1::bigint[], $2::integer[]))
