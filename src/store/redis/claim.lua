-- ARGV: fingerprint, nonce, lease, retention, what to do with a lost key, most attempts, whether replicas must have the answer
local if_lost = ARGV[5]
if not state then
  kind, fingerprint, nonce, fence, attempt = EXECUTE, ARGV[1], ARGV[2], math.max(now, 1), 1
elseif fingerprint ~= ARGV[1] then
  return replica() or {key, 'mismatch'}
elseif state ~= IN_FLIGHT or nonce ~= ARGV[2] and left > 0 and ends <= now + left then
  -- A claim changes nothing about it: the client decides by the record.
  if ARGV[7] == 'replicated' and state >= TOMBSTONE then
    -- WAIT asks only about what its own connection wrote.
    redis.call('PEXPIREAT', key, expiry())
  end
  return replica() or {key, 'record', now, bytes}
elseif nonce == ARGV[2] then
  -- The reply to this very claim was lost: the same grant again, of the same kind.
  is_optional = left * 2 > tonumber(ARGV[3])
elseif left > 0 then
  -- The clock went backwards: nobody waits longer than a lease for it to catch up.
  ends, reply, is_optional = now + left, {key, 'wait', left}, true
elseif if_lost == 'refuse' or attempt >= tonumber(ARGV[6]) then
  state, ends, reply, wakes, is_optional = UNKNOWN, 0, {key, 'unknown'}, true, true
else
  kind = if_lost == 'recover' and RECOVER or EXECUTE
  nonce, fence, attempt, wakes = ARGV[2], math.max(now, fence + 1), attempt + 1, true
end
if not reply then
  -- The record outlives its lease by its retention, in every state: a crash must not make the key absent.
  state, lease, retention = IN_FLIGHT, tonumber(ARGV[3]), tonumber(ARGV[4])
  ends = now + lease
  expires = ends + retention
  reply = {key, kind == RECOVER and 'recover' or 'execute', fence, attempt}
end
