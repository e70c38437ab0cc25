-- ARGV: owner, lease
local lease = tonumber(ARGV[2])
local record, refusal = read()
if refusal then return refusal end
if not record or record.state ~= IN_FLIGHT or not is_owned(record, ARGV[1]) then return {'superseded'} end
lease_for(record, lease)
refusal = put(record)
if refusal then return refusal end
if lease == 0 then wake() end
return {'renewed'}
