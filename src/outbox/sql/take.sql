-- $1 messages, $2 bytes of payload, $3 lease, $4 first pause, $5 longest pause, all three in seconds, $6 question.
-- What was taken, and of which nobody told what became, may have killed its relay: it is taken alone.
-- `statement_timestamp()` is stable, so that the index is searched up to it; `clock_timestamp()` would read all of it.
WITH early AS (
    -- Nothing that nobody has waits for longer than the longest pause, unless the server's clock has gone back since.
    UPDATE {table} SET publish_at = statement_timestamp()
    WHERE position = ANY (ARRAY(
        SELECT position FROM {table}
        WHERE NOT suspect AND publish_at > statement_timestamp() + make_interval(secs => $3::float8 + greatest($4::float8, $5::float8) + 1)
        ORDER BY publish_at LIMIT $1 FOR UPDATE SKIP LOCKED
    ))
), first AS MATERIALIZED (
    SELECT position, suspect FROM {table}
    WHERE publish_at <= statement_timestamp()
    ORDER BY publish_at, position LIMIT 1 FOR UPDATE SKIP LOCKED
), due AS MATERIALIZED (
    SELECT position, publish_at, octet_length(payload) AS bytes FROM {table}
    WHERE publish_at <= statement_timestamp() AND NOT suspect AND NOT (SELECT suspect FROM first)
    ORDER BY publish_at, position LIMIT $1 FOR UPDATE SKIP LOCKED
), summed AS (
    SELECT position, sum(bytes) OVER running AS bytes, row_number() OVER running AS number FROM due
    WINDOW running AS (ORDER BY publish_at, position ROWS UNBOUNDED PRECEDING)
), chosen AS (
    SELECT position FROM first WHERE suspect
    UNION ALL
    SELECT position FROM summed WHERE number = 1 OR bytes <= $2
), taken AS (
    UPDATE {table} SET
        failures = failures + 1,
        suspect = true,
        publish_at = statement_timestamp()
            + make_interval(secs => $3::float8 + least($5::float8, $4::float8 * 2::float8 ^ least(failures, 20)))
    -- As an array, so that the rows are always found by their index.
    WHERE position = ANY (ARRAY(SELECT position FROM chosen))
    RETURNING position, id, topic, names, contents, payload, failures
)
-- Returns one row also if nothing was taken, because the tag shows in which transaction the statement ran.
SELECT taken.*, {tag} AS statement, $6::bigint AS question FROM (SELECT) one LEFT JOIN taken ON true
