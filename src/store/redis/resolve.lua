-- ARGV: fence, state (empty if the attempt had no effect), retention in microseconds, the bytes
-- behind the header.
--
-- Each branch is one case of `Record::resolve`.
if not state then return {key, 'conflict'} end
-- A resolution applies only to the attempt that it names, and only if that attempt is lost or
-- unknown.
local owner_may_live = state >= TOMBSTONE or left > 0
if owner_may_live or string.sub(bytes, 53, 60) ~= ARGV[1] then return {key, 'conflict', fence} end
reply, wakes = {key, 'resolved'}, true
if ARGV[2] == '' then
  state = nil
else
  state, ends, expires, response = tonumber(ARGV[2]), 0, now + tonumber(ARGV[3]), ARGV[4]
  -- The owner may still be alive. Another nonce in the record ends its ownership. Otherwise its
  -- completion would count as a repeated one, and its caller would get another response than all
  -- others (I2). A rejection stores no outcome, so it leaves the owner in place. Only a completion
  -- inverts the nonce, because a second inversion would restore the former owner.
  if state >= TOMBSTONE then nonce = string.char(255 - string.byte(nonce)) .. string.sub(nonce, 2) end
end
