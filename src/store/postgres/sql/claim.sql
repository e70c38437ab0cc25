-- All tries of a claim after the first one.
--
-- $1 key, $2 fingerprint, $3 nonce, $4 lease, $5 retention, $6 the policy for a lost key (0
-- execute, 1 recover, 2 refuse), $7 the largest number of attempts, $8 lock timeout or NULL, $9
-- question. Times and durations are in microseconds.
--
-- No row means that another claim was committed since this statement began. Try again.
WITH bounded AS MATERIALIZED (
    -- Set the lock timeout before the statement waits for a row lock. Another transaction may hold
    -- the lock for any time, and without a timeout a backend would wait even if its caller has left
    -- (I10). $8 is NULL if the session has a lock timeout, and in a transaction of the application.
    SELECT CASE WHEN $8::text IS NOT NULL THEN set_config('lock_timeout', $8, true) END
), seen AS (
    -- The record as it was when the statement began, without a lock.
    SELECT r.*, {now} AS now FROM {table} r WHERE r.key = $1
), settled AS (
    -- Has a row if the claim would not change the seen record. Then the next step neither writes
    -- nor locks. The cases are: a version that this release does not know, another fingerprint
    -- (I4), a record that is not in flight, and a live lease of another owner (I1). A lease that
    -- ends later than a whole lease from now is not such a case, because the clock went backwards.
    SELECT FROM seen r
    WHERE r.version <> 1
       OR NOT {expired}
          AND (r.fingerprint <> $2 OR r.state <> 0 OR r.nonce <> $3 AND r.now < r.lease_until AND r.lease_until <= r.now + r.lease)
), claimed AS (
    -- Insert the record, or change the existing one in place. ON CONFLICT locks the row and reads
    -- its newest version. So the update decides again from that version, and finds its phase:
    --
    -- * first: the record has expired. Grant a first attempt, with a greater fence (I9).
    -- * again: the nonce of this claim owns the record. Repeat the grant of the same kind, with a
    --   new lease.
    -- * cut: the clock went backwards. Cut the lease back to one lease from now (I7).
    -- * taken: the owner is lost. Take the key over, with a greater fence and one more attempt
    --   (I9).
    -- * over: the owner is lost, and this claim may not run. The outcome is unknown (I3).
    --
    -- A grant expires after its lease and its retention, so a crash never makes the key absent
    -- (I6).
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
                -- OFFSET 0 keeps the server from inlining the clock, so that all uses see one time.
                FROM (SELECT {now} AS now OFFSET 0) clock
            ) p
        )
    -- The row may have changed since it was seen, so repeat the conditions of `settled` for the
    -- locked row. If they exclude the change, no row is returned here.
    WHERE r.version = 1
      AND ({expired_now}
           OR r.fingerprint = $2 AND r.state = 0
              AND (r.nonce = $3 OR {now} >= r.lease_until OR r.lease = 0 OR r.lease_until > {now} + r.lease))
    RETURNING r.*, {now} AS now
)
-- Return the changed record, or the seen one if nothing was changed. Notify the waiters of a
-- takeover.
SELECT true AS changed, {columns}, CASE WHEN r.watched AND r.attempt > 1 THEN {notify} END AS notified,
    {tag} AS statement, $9::bigint AS question FROM claimed r
UNION ALL
SELECT false, {columns}, NULL::text, {tag}, $9 FROM seen r WHERE NOT EXISTS (SELECT FROM claimed)
