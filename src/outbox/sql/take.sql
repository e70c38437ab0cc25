-- Takes due messages for a relay.
--
-- $1 the largest number of messages, $2 the largest sum of payloads in bytes, $3 lease, $4 first
-- pause, $5 longest pause, all three in seconds, $6 question.
--
-- A message that was taken but never reported on is suspect: it may have killed its relay, so it is
-- taken on its own.
--
-- `statement_timestamp()` is stable, so the server searches the index up to that time. With
-- `clock_timestamp()`, it would read the whole index. All steps skip rows that another relay has
-- locked, so relays never wait for each other.
WITH early AS (
    -- An untaken message is never due later than the longest pause from now. If it is due even
    -- later than that pause, a lease and a second from now, the server's clock was set back. Make
    -- such messages due, so that the next take finds them. A taken message may be due later, because
    -- its relay may have a longer lease. The clock was set back if the message was taken in the
    -- future. It is then due in a lease, because its relay may be alive.
    UPDATE {table} SET
        publish_at = statement_timestamp() + make_interval(secs => CASE WHEN taken_at IS NULL THEN 0 ELSE $3::float8 END)
    WHERE position = ANY (ARRAY(
        SELECT position FROM {table}
        WHERE publish_at > statement_timestamp() + make_interval(secs => $3::float8 + greatest($4::float8, $5::float8) + 1)
            AND (taken_at IS NULL OR taken_at > statement_timestamp() + interval '1 s')
        ORDER BY publish_at LIMIT $1 FOR UPDATE SKIP LOCKED
    ))
), first AS MATERIALIZED (
    -- The message that has been due for the longest time decides whether this take is a batch or a
    -- single suspect message.
    SELECT position, taken_at IS NOT NULL AS suspect FROM {table}
    WHERE publish_at <= statement_timestamp()
    ORDER BY publish_at, position LIMIT 1 FOR UPDATE SKIP LOCKED
), due AS MATERIALIZED (
    -- The candidates of a batch. There are none if the first message is suspect.
    SELECT position, publish_at, octet_length(payload) AS bytes FROM {table}
    WHERE publish_at <= statement_timestamp() AND taken_at IS NULL AND NOT (SELECT suspect FROM first)
    ORDER BY publish_at, position LIMIT $1 FOR UPDATE SKIP LOCKED
), summed AS (
    -- Number the candidates, and add up their payloads.
    SELECT position, sum(bytes) OVER running AS bytes, row_number() OVER running AS number FROM due
    WINDOW running AS (ORDER BY publish_at, position ROWS UNBOUNDED PRECEDING)
), chosen AS (
    -- The suspect message, or as many candidates as fit into the bytes of a batch, at least one.
    SELECT position FROM first WHERE suspect
    UNION ALL
    SELECT position FROM summed WHERE number = 1 OR bytes <= $2
), taken AS (
    -- Count one more attempt, and mark the messages as taken until the relay reports on them.
    -- Other relays do not see them before the lease and the pause are over, so that they are
    -- retried if the relay dies. Bound the count, because a row whose next count or pause cannot be
    -- computed would stop the whole batch.
    UPDATE {table} SET
        failures = least(failures, 2147483646) + 1,
        taken_at = statement_timestamp(),
        publish_at = statement_timestamp()
            + make_interval(secs => $3::float8 + least($5::float8, $4::float8 * 2::float8 ^ greatest(least(failures, 20), 0)))
    -- An array lets the server find the rows by their index in every plan.
    WHERE position = ANY (ARRAY(SELECT position FROM chosen))
    RETURNING position, id, topic, names, contents, payload, failures
)
-- Return one row even if nothing was taken, because the tag shows in which transaction the
-- statement ran.
SELECT taken.*, {tag} AS statement, $6::bigint AS question FROM (SELECT) one LEFT JOIN taken ON true
