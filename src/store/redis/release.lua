-- ARGV: owner (nonce and fence).
--
-- Each branch is one case of `Record::release`.
if not state then return {key, 'released'} end
-- Only the owner changes a claim (I8), and a completed record has ended.
if state >= TOMBSTONE or string.sub(bytes, 37, 60) ~= ARGV[1] then return {key, 'superseded'} end
-- Delete only if this was the only attempt ever. Otherwise the record is evidence of an earlier one
-- (I6).
if attempt == 1 then
  state = nil
elseif state == UNKNOWN then
  return {key, 'released'}
else
  -- End the lease now, and keep the record for its retention.
  lease, ends, expires = 0, now, now + retention
end
reply, wakes = {key, 'released'}, true
