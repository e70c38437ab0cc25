-- $1 key, $2 fingerprint, $3 nonce, $4 lease, $5 retention, $6 lock timeout or NULL, $7 question. Decides most claims:
-- the key is free, or the claim changes nothing about its record. Whatever else is seen is for claim.sql, whose many
-- expressions a server needs longer to set up than to evaluate. No row: another claim was committed since this
-- statement began.
WITH seen AS (
    SELECT r.*, {now} AS now FROM {table} r WHERE r.key = $1
), claimed AS (
    INSERT INTO {table} AS r
        (key, version, state, kind, fingerprint, nonce, fence, attempt, lease, retention, lease_until, expires)
    SELECT $1, 1, 0, 0, $2, $3, greatest(now, 1), 1, $4, $5, now + $4, now + $4 + $5
    FROM (SELECT {now} AS now) clock
    WHERE NOT EXISTS (SELECT FROM seen) AND {bounded $6}
    ON CONFLICT (key) DO NOTHING
    RETURNING r.*, {now} AS now
)
SELECT true AS changed, {columns}, {tag} AS statement, $7::bigint AS question FROM claimed r
UNION ALL
SELECT false, {columns}, {tag}, $7 FROM seen r
