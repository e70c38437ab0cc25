-- $1 key, $2 fingerprint, $3 nonce, $4 lease, $5 retention, $6 if lost: 0 execute, 1 recover, 2 refuse, $7 attempts in all,
-- $8 how long to wait for a lock, NULL in a transaction of the application's. Another one may keep the row locked for as long as it
-- likes: a statement that nobody waits for any more would keep a backend of the server's waiting with it.
-- No row: another claim was committed since this statement began. Ask again.
WITH bounded AS MATERIALIZED (
    SELECT CASE WHEN $8::text IS NOT NULL THEN set_config('lock_timeout', $8, true) END
), seen AS (
    SELECT r.*, {now} AS now FROM {table} r WHERE r.key = $1
), settled AS (
    -- What a claim changes nothing about is not locked either.
    SELECT FROM seen r
    WHERE r.version <> 1
       OR NOT {expired}
          AND (r.fingerprint <> $2 OR r.state <> 0 OR r.nonce <> $3 AND r.now < r.lease_until AND r.lease_until <= r.now + r.lease)
), claimed AS (
    INSERT INTO {table} AS r
        (key, version, state, kind, fingerprint, nonce, fence, attempt, lease, retention, lease_until, expires)
    SELECT $1, 1, 0, 0, $2, $3, greatest(now, 1), 1, $4, $5, now + $4, now + $4 + $5
    FROM (SELECT {now} AS now FROM bounded) clock
    WHERE NOT EXISTS (SELECT FROM settled)
    ON CONFLICT (key) DO UPDATE SET
        (state, kind, fingerprint, nonce, fence, attempt, lease, retention, lease_until, expires, head, body) = (
            SELECT
                CASE p.phase WHEN 'over' THEN 1 ELSE 0 END,
                CASE p.phase WHEN 'first' THEN 0 WHEN 'taken' THEN $6 ELSE r.kind END,
                CASE p.phase WHEN 'first' THEN $2 ELSE r.fingerprint END,
                CASE WHEN p.phase IN ('first', 'taken') THEN $3 ELSE r.nonce END,
                CASE WHEN p.phase IN ('first', 'taken') THEN greatest(p.now, r.fence + 1) ELSE r.fence END,
                CASE p.phase WHEN 'first' THEN 1 WHEN 'taken' THEN r.attempt + 1 ELSE r.attempt END,
                CASE WHEN p.phase IN ('first', 'taken', 'again') THEN $4 ELSE r.lease END,
                CASE WHEN p.phase IN ('first', 'taken', 'again') THEN $5 ELSE r.retention END,
                CASE
                    WHEN p.phase IN ('first', 'taken', 'again') THEN p.now + $4
                    ELSE least(r.lease_until, p.now + r.lease)
                END,
                CASE WHEN p.phase IN ('first', 'taken', 'again') THEN p.now + $4 + $5 ELSE r.expires END,
                NULL::bytea,
                NULL::bytea
            FROM (
                SELECT
                    clock.now,
                    CASE
                        WHEN clock.now >= r.expires
                            AND NOT (r.state = 0 AND clock.now < least(r.lease_until, clock.now + r.lease)) THEN 'first'
                        WHEN r.nonce = $3 THEN 'again'
                        WHEN clock.now < least(r.lease_until, clock.now + r.lease) THEN 'cut'
                        WHEN $6 <> 2 AND r.attempt < $7 THEN 'taken'
                        ELSE 'over'
                    END AS phase
                FROM (SELECT {now} AS now OFFSET 0) clock
            ) p
        )
    -- The row may have changed since it was seen.
    WHERE r.version = 1
      AND ({expired_now}
           OR r.fingerprint = $2 AND r.state = 0
              AND (r.nonce = $3 OR {now} >= r.lease_until OR r.lease = 0 OR r.lease_until > {now} + r.lease))
    RETURNING r.*, {now} AS now
)
SELECT true AS changed, {columns}, CASE WHEN r.watched AND r.attempt > 1 THEN {notify} END AS told,
    {tag} AS statement, $9::bigint AS question FROM claimed r
UNION ALL
SELECT false, {columns}, NULL::text, {tag}, $9 FROM seen r WHERE NOT EXISTS (SELECT FROM claimed)
