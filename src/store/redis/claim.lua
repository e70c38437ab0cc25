-- ARGV: fingerprint, nonce, lease, retention (both in microseconds), the policy for a lost key
-- ('execute', 'recover' or 'refuse'), the largest number of attempts, 'replicated' or ''.
--
-- The branches are the cases of `Record::claim`. A branch that returns changes nothing. All other
-- branches continue in commit.lua.
local if_lost = ARGV[5]
if not state then
  -- The key is absent or expired: grant the first attempt. The fence is the server's time (I9).
  kind, fingerprint, nonce, fence, attempt = EXECUTE, ARGV[1], ARGV[2], math.max(now, 1), 1
elseif fingerprint ~= ARGV[1] then
  -- Another request has used this key. This comes before all other cases (I4).
  return replica() or {key, 'mismatch'}
elseif state ~= IN_FLIGHT or nonce ~= ARGV[2] and left > 0 and ends <= now + left then
  -- The record is completed or unknown, or another owner has a live lease (I1). A claim does not
  -- change it, so the client decides from the bytes of the record. The last condition excludes a
  -- lease that ends later than a whole lease from now; `left` is capped at one lease.
  if ARGV[7] == 'replicated' and state >= TOMBSTONE then
    -- WAIT counts only the replicas that have the writes of its own connection. This write changes
    -- nothing, but lets WAIT cover the response that is about to be replayed.
    redis.call('PEXPIREAT', key, expiry())
  end
  return replica() or {key, 'record', now, bytes}
elseif nonce == ARGV[2] then
  -- The reply to an earlier copy of this claim was lost. Return the same grant, of the same kind. A
  -- full server may refuse the write as long as half of the lease is left.
  is_optional = left * 2 > tonumber(ARGV[3])
elseif left > 0 then
  -- The lease ends later than a whole lease from now, so the clock went backwards. Cut the lease
  -- back, so that a waiter waits for one lease at most (I7).
  ends, reply, is_optional = now + left, {key, 'wait', left}, true
elseif if_lost == 'refuse' or attempt >= tonumber(ARGV[6]) then
  -- The owner is lost, and this claim may not run again: the outcome is unknown (I3).
  state, ends, reply, wakes, is_optional = UNKNOWN, 0, {key, 'unknown'}, true, true
else
  -- The owner is lost, and this claim takes the key over. The fence must grow even if the clock has
  -- not moved (I9).
  kind = if_lost == 'recover' and RECOVER or EXECUTE
  nonce, fence, attempt, wakes = ARGV[2], math.max(now, fence + 1), attempt + 1, true
end
if not reply then
  -- Write the grant. The record outlives its lease by its retention, so that a crash of the owner
  -- does not make the key absent (I6).
  state, lease, retention = IN_FLIGHT, tonumber(ARGV[3]), tonumber(ARGV[4])
  ends = now + lease
  expires = ends + retention
  reply = {key, kind == RECOVER and 'recover' or 'execute', fence, attempt}
end
