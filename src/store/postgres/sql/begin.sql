-- The first try of a claim.
--
-- $1 key, $2 fingerprint, $3 nonce, $4 lease, $5 retention, $6 lock timeout or NULL, $7 question.
-- Times and durations are in microseconds.
--
-- It decides most claims: the key is free, or the claim does not change its record. All other
-- claims need claim.sql. They are separate statements because a server takes longer to set up the
-- many expressions of claim.sql than to evaluate them. No row means that another claim was
-- committed since this statement began.
WITH seen AS (
    -- The record as it was when the statement began, without a lock.
    SELECT r.*, {now} AS now FROM {table} r WHERE r.key = $1
), claimed AS (
    -- Insert the record if there was none. The unique index lets only one of several concurrent
    -- claims insert it (I1). The fence is the server's time (I9).
    INSERT INTO {table} AS r
        (key, version, state, kind, fingerprint, nonce, fence, attempt, lease, retention, lease_until, expires)
    SELECT $1, 1, 0, 0, $2, $3, greatest(now, 1), 1, $4, $5, now + $4, now + $4 + $5
    FROM (SELECT {now} AS now) clock
    WHERE NOT EXISTS (SELECT FROM seen) AND {set_lock_timeout $6}
    ON CONFLICT (key) DO NOTHING
    RETURNING r.*, {now} AS now
)
SELECT true AS changed, {columns}, {tag} AS statement, $7::bigint AS question FROM claimed r
UNION ALL
SELECT false, {columns}, {tag}, $7 FROM seen r
